"""What a packed layer and packed experts have in common: tensors that are no weights in the model's dtype."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, TypeVar

import torch
from torch import nn
from torch._C._functorch import peek_interpreter_stack

from graftq.quant_linear.layouts import CheckpointLayout, Packed, SeparateLayout

logger = logging.getLogger(__name__)

_quiet: ContextVar[bool] = ContextVar("graftq_asking_for_state", default=False)


def is_transformed() -> bool:
    """Whether a transform of ``torch.func`` (jvp, vmap, grad, ...) is under way, of which our operators know none."""
    return not torch.compiler.is_compiling() and peek_interpreter_stack() is not None


@contextmanager
def asking_for_state() -> Iterator[None]:
    """Say nothing about layouts in state dicts: who asks for one knows."""
    token = _quiet.set(True)
    try:
        yield
    finally:
        _quiet.reset(token)


@cache
def _say_once() -> None:
    logger.info(
        "graftq: state_dict() of a packed model has tensors in the layout of this machine's kernels, which "
        "from_pretrained() cannot load; save_pretrained() writes the checkpoint"
    )


Own = TypeVar("Own", bound="PackedModule")


class PackedModule(nn.Module):
    """A module whose packed tensors follow it to a device, and keep their dtypes whatever the module is cast to.

    They are buffers: programs loop over parameters to cast them, some of them by their number of dimensions.

    Attributes:
        layout: The arrangement of the packed tensors now.
        dtype: The model's, which a plain weight in the module's place would have; it follows casts.
        keeps_dtype: Whether the model wants this module in :attr:`dtype` even if it is in a narrower one itself: then
            activations are widened to it, and no cast narrows it.
    """

    dtype: torch.dtype
    layout: Any
    keeps_dtype: bool = False

    def widened(self, x: torch.Tensor) -> torch.Tensor:
        """Activations as the module computes with them; under autocast they are what that makes of them."""
        if not self.keeps_dtype or x.itemsize >= self.dtype.itemsize or torch.is_autocast_enabled(x.device.type):
            return x
        return x.to(self.dtype)

    def packed(self) -> Packed:
        """The packed tensors by name, in the current layout."""
        raise NotImplementedError

    def hold(self, packed: Mapping[str, torch.Tensor]) -> None:
        """Take tensors of the current layout, in the place of those of the same names."""
        for name, tensor in packed.items():
            self._parameters.pop(name, None)
            self.register_buffer(name, tensor.detach())

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if not isinstance(self.layout, (CheckpointLayout, SeparateLayout)) and not _quiet.get():
            _say_once()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def requires_grad_(self: Own, requires_grad: bool = True) -> Own:
        """As of any module, but for the packed tensors, of which most are integers.

        Raises:
            ValueError: if they are to be trained.
        """
        if requires_grad:
            raise ValueError(
                f"packed weights cannot be trained: {type(self).__name__}({self.extra_repr()}); train adapters, "
                "or dequantize() the model first"
            )
        return super().requires_grad_(requires_grad)

    def _apply(self: Own, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Own:
        """Move or cast the tensors; of the packed ones, none is cast."""
        if recurse:
            for child in self.children():
                child._apply(fn)
        packed = list(self.packed().values())
        kept = {id(tensor) for tensor in packed}

        def apply(tensor: torch.Tensor) -> torch.Tensor:
            applied = fn(tensor)
            if id(tensor) not in kept or applied.dtype == tensor.dtype:
                return applied
            return tensor.to(applied.device)

        super()._apply(apply, recurse=False)
        if packed:
            dtype = fn(torch.empty(0, dtype=self.dtype, device=packed[0].device)).dtype
            if not self.keeps_dtype or dtype.itemsize > self.dtype.itemsize:
                self.dtype = dtype
        return self
