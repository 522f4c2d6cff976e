"""Layers that are called one after the other with the same input, multiplied in one: q, k and v; gate and up.

Each keeps its name, its spec and its tensors: the first one's tensors go on where its own rows end, with the others',
whose tensors are views of them. So the first layer's call can compute for all, and the others' calls only look up.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from graftq.quant_linear.gpu.dispatch_bypass import is_unwatched
from graftq.quant_linear.gpu.tiled_layout import PADDED_N, TiledLayout
from graftq.quant_linear.linear import QuantLinear

logger = logging.getLogger(__name__)

_ALIKE = ("bits", "in_features", "group_size", "num_groups", "desc_act", "sym", "zero_offset", "padded_in", "has_bias")
_SIDE_BY_SIDE = {"codes": 0, "high": 0, "scales": 1, "qzeros": 1, "bias": 0}
"""The dimension of outputs in the tensors of ``TiledLayout`` that have one."""


def join_siblings(layers: Sequence[QuantLinear]) -> bool:
    """Let the first of ``layers`` multiply for all, if they allow it: same kernel, same act-order, nothing padded.

    To be called once they are bound. They are expected to be called in this order, with the same tensor each; should
    they not be, they go back to multiplying one by one. While gradients are recorded they always do.

    Returns:
        Whether they were joined.
    """
    if len(layers) < 2 or not _can_join(layers):
        return False
    for name, dimension in _SIDE_BY_SIDE.items():
        tensors = [layer._parameters.get(name) for layer in layers]
        if tensors[0] is None:
            continue
        whole = torch.cat([tensor for tensor in tensors if tensor is not None], dimension)
        start = 0
        for layer, tensor in zip(layers, tensors, strict=True):
            assert tensor is not None
            width = tensor.shape[dimension]
            layer.hold({name: whole.narrow(dimension, start, width) if start else whole})
            start += width
    joint = SiblingProduct(layers)
    for place, layer in enumerate(layers):
        layer.joint = (joint, place)
    return True


def _can_join(layers: Sequence[QuantLinear]) -> bool:
    kind, order = _kind(layers[0]), layers[0]._parameters.get("order")
    for layer in layers:
        own = layer._parameters.get("order")
        if (
            layer.joint is not None
            or not isinstance(layer.layout, TiledLayout)
            or _kind(layer) != kind
            or layer.spec.padded_out != layer.spec.out_features
            or layer.spec.out_features % PADDED_N
            or (own is None) != (order is None)
            or (own is not order and own is not None and order is not None and not torch.equal(own, order))
        ):
            return False
    return True


def _kind(layer: QuantLinear) -> tuple[object, ...]:
    """What joined layers have in common, besides their act-order."""
    tensors = [layer._parameters.get(name) for name in ("codes", "scales", "bias")]
    stored = [None if tensor is None else (tensor.device, tensor.dtype) for tensor in tensors]
    rows = None if tensors[1] is None else tensors[1].shape[0]
    return (type(layer.provider), layer.dtype, *(getattr(layer.spec, name) for name in _ALIKE), *stored, rows)


class SiblingProduct:
    """The product of joined layers, and the parts of its output that are still to be fetched.

    That the layers are called with the same tensor does not say that it still holds the same numbers. So the first
    time the numbers are compared, eagerly: what comes before that, compiled, traced or captured, multiplies one by one.

    The layers hold this object, and it holds them weakly: a cycle would keep their memory after ``del model``.
    """

    def __init__(self, layers: Sequence[QuantLinear]):
        self._layers = [weakref.ref(layer) for layer in layers]
        self._widths = [layer.out_features for layer in layers]
        total, spec = sum(self._widths), layers[0].spec
        self._spec = replace(spec, out_features=total, padded_out=total, stored_bias=total if spec.has_bias else 0)
        self._waiting: tuple[torch.Tensor, tuple[torch.Tensor, ...]] | None = None
        self._numbers: torch.Tensor | None = None
        self._is_proven = False

    def __call__(self, layer: QuantLinear, place: int, x: torch.Tensor) -> torch.Tensor:
        """What ``layer``, the one at ``place``, returns for ``x``."""
        if not self._is_proven and (not is_unwatched(x) or _is_capturing(x)):
            return layer.multiply(x, layer.spec)
        waiting = self._waiting
        if place == 0 and waiting is None:
            parts = layer.multiply(x, self._spec).split(self._widths, -1)
            self._waiting = (x, parts)
            if not self._is_proven:
                self._numbers = _bits(x).clone()
            return parts[0]
        if place > 0 and waiting is not None and waiting[0] is x and self._still_holds(x):
            if place == len(self._widths) - 1:
                self._waiting = self._numbers = None
                self._is_proven = True
            return waiting[1][place]
        self.dissolve("they are not called one after the other with the same input")
        return layer.multiply(x, layer.spec)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which weak references do not survive."""
        return {**self.__dict__, "_layers": self._alive()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = {**state, "_layers": [weakref.ref(layer) for layer in state["_layers"]]}

    def _alive(self) -> list[QuantLinear]:
        return [layer for reference in self._layers if (layer := reference()) is not None]

    def _still_holds(self, x: torch.Tensor) -> bool:
        return self._is_proven or (self._numbers is not None and torch.equal(self._numbers, _bits(x)))

    def dissolve(self, reason: str) -> None:
        """Let each layer multiply by itself from now on."""
        self._waiting = self._numbers = None
        for layer in self._alive():
            layer.joint = None
        if not torch.compiler.is_compiling():
            logger.debug("layers of %s outputs multiply one by one from now on: %s", self._widths, reason)


def _bits(x: torch.Tensor) -> torch.Tensor:
    """The numbers as integers, since NaN does not equal itself."""
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize])


def _is_capturing(x: torch.Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()
