"""Packed tensors that accelerate keeps elsewhere, on the disk or another device, and lends for each call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from graftq.quant_linear.layouts import Packed
from graftq.quant_linear.packed_module import PackedModule


def weights_maps(module: nn.Module) -> Iterator[Mapping[str, torch.Tensor]]:
    """Where the hooks of ``module`` have the tensors that they lend to it, by their names in it."""
    for hook in _hooks(module):
        weights = getattr(hook, "weights_map", None)
        if weights is not None:
            yield weights


def brought_in(module: nn.Module, packed: Packed) -> Packed:
    """The packed tensors of ``module``, those on the meta device brought to where it computes.

    Args:
        module: A packed module, in a call or outside of one.
        packed: Its tensors as they are now.

    Raises:
        RuntimeError: if one has no values, and the module's own hooks do not have them either.
    """
    if not any(tensor.is_meta for tensor in packed.values()):
        return packed
    device = home(module)
    found: dict[str, torch.Tensor] = {}
    for name, tensor in packed.items():
        found[name] = _bring_in(module, name, tensor).to(device) if tensor.is_meta else tensor
    return Packed(found, packed.form)


def home(module: nn.Module) -> torch.device:
    """The device that the tensors of a packed module are on in a call: its hook's for those that are lent to it."""
    tensors = [*module.parameters(), *module.buffers()]
    device = next((tensor.device for tensor in tensors if not tensor.is_meta), torch.device("meta"))
    if not any(tensor.is_meta for tensor in tensors):
        return device
    devices = (each.execution_device for own in module.modules() for each in _hooks(own) if _is_lending(each))
    return next((torch.device(each) for each in devices if each is not None), device)


def lends(module: nn.Module) -> bool:
    """Whether hooks of ``module``, or of modules inside, lend them tensors for each call, and take them away then."""
    return any(_is_lending(hook) for own in module.modules() for hook in _hooks(own))


@contextmanager
def keeping_places(model: nn.Module) -> Iterator[None]:
    """Let no part of a packed model look offloaded to what loads adapters on it, if packed layers are.

    PEFT would dispatch it anew, and transformers would offload adapters, in both cases without what brings them in.
    """
    packed = [module for module in model.modules() if isinstance(module, PackedModule) and lends(module)]
    maps = {module: vars(module)["hf_device_map"] for module in model.modules() if "hf_device_map" in vars(module)}
    for module, devices in maps.items() if packed else ():
        here = {part: home(packed[0]) if device in ("cpu", "disk") else device for part, device in devices.items()}
        vars(module)["hf_device_map"] = here
    try:
        yield
    finally:
        for module, devices in maps.items():
            vars(module)["hf_device_map"] = devices


def check_own(module: nn.Module, kernel: str) -> None:
    """Raise before the tensors of ``module`` are rearranged, if they are only lent to it for a call.

    accelerate puts them back under the names that they had when the module was dispatched, in the layout of that time.

    Raises:
        RuntimeError: naming the kernel that would have to rearrange them.
    """
    if any(_is_lending(each) and each.offload_buffers for each in _hooks(module)):
        raise RuntimeError(
            f"{type(module).__name__}({module.extra_repr()}) was offloaded in the layout of another kernel, and "
            f"{kernel!r} cannot rearrange what is only lent for a call; let from_pretrained(device_map=...) offload "
            "the model, or call it where and in the dtype in which it was loaded"
        )


def _bring_in(module: nn.Module, name: str, stand_in: torch.Tensor) -> torch.Tensor:
    for weights in weights_maps(module):
        with suppress(KeyError):
            return weights[name].to(stand_in.dtype)
    raise RuntimeError(
        f"{name} of {type(module).__name__}({module.extra_repr()}) is on the meta device: it is offloaded, and no hook "
        "of its own brings it in outside of a call"
    )


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    hook: Any = getattr(module, "_hf_hook", None)
    return getattr(hook, "hooks", (hook,))  # several are one that has them


def _is_lending(hook: Any) -> bool:
    return getattr(hook, "offload", False)
