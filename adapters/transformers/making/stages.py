"""Finds the units of a block by watching it run."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from graftq.adapters.transformers.making.units import Experts, Linears, Run, Unit, Units, matrix, stacked
from graftq.adapters.transformers.placement import is_experts

WORD = 32
"""Codes that fill whole words whatever their width; older loaders have no padding."""


def find_units(block: nn.Module, run: Run, group_size: int, wanted: Collection[str] | None = None) -> Units:
    """Watch a block run once.

    Args:
        block: The block.
        run: Runs it on a batch.
        group_size: -1 or what must divide a layer's inputs.
        wanted: Names of layers and experts modules relative to the block; None for all.
    """
    layers = {name: each for name, each in block.named_modules() if isinstance(each, (nn.Linear, Conv1D))}
    containers = {name: each for name, each in block.named_modules() if is_experts(each)}
    skipped = {name: reason for name, each in layers.items() if (reason := unfit(matrix(each).shape, group_size))}
    skipped.update(_routers(layers, containers))
    for name, experts in containers.items():
        shapes = [stacked(experts, is_down).shape[1:] for is_down in (False, True)]
        half = (shapes[0][0] // 2 if hasattr(experts, "gate_up_proj") else shapes[0][0], shapes[0][1])
        reason = unfit(half, group_size) or unfit(shapes[1], group_size)
        if reason:
            skipped[name] = reason
    if wanted is not None:
        for name in (*layers, *containers):
            if name not in wanted:
                skipped.setdefault(name, "not among the modules to quantize")
    calls = _watch({**layers, **containers}, run)
    found: list[Unit] = []
    by_input: dict[Any, Linears] = {}
    for name, key in calls.items():
        if name in skipped:
            continue
        if len(key) > 1:
            skipped[name] = "called more than once"
        elif name in containers:
            found += [Experts(name, False), Experts(name, True)]
        elif key[0] in by_input:
            by_input[key[0]].names.append(name)
        else:
            by_input[key[0]] = Linears([name])
            found.append(by_input[key[0]])
    for name in (*layers, *containers):
        if name not in calls:
            skipped.setdefault(name, "not called as a module")
    return Units(found, skipped)


def unfit(shape: Sequence[int], group_size: int) -> str:
    """Why a layer of this shape stays float; "" if it need not."""
    outputs, inputs = shape
    if outputs == 1:
        return "a gate"
    if outputs % WORD or inputs % WORD:
        return f"{inputs} inputs and {outputs} outputs: not multiples of {WORD}"
    if group_size != -1 and inputs % group_size and inputs > group_size:
        return f"{inputs} inputs: no multiple of the group size, {group_size}"
    return ""


def _routers(layers: dict[str, Any], containers: dict[str, Any]) -> dict[str, str]:
    """Linear layers beside experts that have one output per expert: what is lost there, every expert pays."""
    found = {}
    for container, experts in containers.items():
        parent = container.rpartition(".")[0]
        for name, layer in layers.items():
            if name.startswith(parent) and len(matrix(layer)) == experts.num_experts:
                found[name] = "a router"
    return found


def _watch(modules: dict[str, nn.Module], run: Run) -> dict[str, list[Any]]:
    """Which modules are called, in order, and with which tensor each time."""
    calls: dict[str, list[Any]] = {}
    kept: list[torch.Tensor] = []  # no other tensor may come to lie where one of these did

    def hook_for(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            kept.append(x)
            calls.setdefault(name, []).append((x.data_ptr(), x.numel(), x._version))

        return hook

    handles = [module.register_forward_pre_hook(hook_for(name), with_kwargs=True) for name, module in modules.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return calls
