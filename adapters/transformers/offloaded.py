"""Tensors that accelerate keeps elsewhere, on the disk or another device, and brings in for each call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from graftq.quant_linear.experts import QuantExperts
from graftq.quant_linear.layouts import CheckpointLayout, Packed, SeparateLayout
from graftq.quant_linear.linear import QuantLinear


def present(model: nn.Module, name: str, module: QuantLinear | QuantExperts) -> Packed:
    """The packed tensors of a module, those that were offloaded in a kernel's layout brought in.

    What was offloaded as the checkpoint stores it stays on the meta device: transformers brings it in by itself, shard
    by shard.

    Args:
        model: The model.
        name: The module's name in it.
        module: The module.

    Raises:
        ValueError: if a tensor is on the meta device, and nothing has its values.
    """
    packed = module.packed()
    if isinstance(module.layout, (CheckpointLayout, SeparateLayout)):
        return packed
    found = {own: _bring_in(model, f"{name}.{own}") if each.is_meta else each for own, each in packed.items()}
    return Packed(found, packed.form)


def _bring_in(model: nn.Module, name: str) -> torch.Tensor:
    """The values of a tensor, from the hook of the innermost module that has them."""
    parts = name.split(".")
    for length in range(len(parts) - 1, -1, -1):
        holder, own = model.get_submodule(".".join(parts[:length])), ".".join(parts[length:])
        for weights in _weights_maps(holder):
            with suppress(KeyError):
                return weights[own]
    raise ValueError(f"{name} is on the meta device, and no hook of accelerate's has its values")


def _weights_maps(module: nn.Module) -> Iterator[Mapping[str, torch.Tensor]]:
    hook: Any = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):  # several hooks are one that has them
        weights = getattr(each, "weights_map", None)
        if weights is not None:
            yield weights
