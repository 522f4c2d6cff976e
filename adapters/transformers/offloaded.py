"""Tensors that accelerate keeps elsewhere, on the disk or another device, and brings in for each call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from graftq.quant_linear.experts import QuantExperts
from graftq.quant_linear.layouts import CheckpointLayout, Packed, SeparateLayout
from graftq.quant_linear.linear import QuantLinear
from graftq.quant_linear.offloaded import home, keeping_places, lends, weights_maps
from graftq.quant_linear.packed_module import PackedModule


def load_adapter_in_place(original: Callable[..., Any]) -> Callable[..., Any]:
    """For ``load_adapter`` of transformers' models: the adapters of an offloaded packed layer stay in memory."""

    @functools.wraps(original)
    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        is_stated = hasattr(self, "hf_device_map")
        lent = next((module for module in self.modules() if isinstance(module, PackedModule) and lends(module)), None)
        if lent is not None and not is_stated:
            self.hf_device_map = {"": home(lent)}  # else transformers takes the model's device, which may be meta
        try:
            with keeping_places(self):
                return original(self, *args, **kwargs)
        finally:
            if lent is not None and not is_stated:
                del self.hf_device_map

    return load_adapter


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
    found = {own: bring_in(model, f"{name}.{own}", each) if each.is_meta else each for own, each in packed.items()}
    return Packed(found, packed.form)


def bring_in(model: nn.Module, name: str, stand_in: torch.Tensor) -> torch.Tensor:
    """The values of a tensor, from the hook of the innermost module that has them, in the dtype of its stand-in.

    Raises:
        ValueError: if no hook has them.
    """
    parts = name.split(".")
    for length in range(len(parts) - 1, -1, -1):
        holder, own = model.get_submodule(".".join(parts[:length])), ".".join(parts[length:])
        for weights in weights_maps(holder):
            with suppress(KeyError):
                return weights[own].to(stand_in.dtype)
    raise ValueError(f"{name} is on the meta device, and no hook of accelerate's has its values")
