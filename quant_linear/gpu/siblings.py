"""One product for layers that are called one after the other with the same input: q, k and v; gate and up.

Each layer keeps its name, its spec and its tensors. The first layer's tensors continue with the output rows of the
others, whose own tensors are views into them. So the first layer's call computes for all, and the others return their
part of its output.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.nn.modules.module import _global_forward_hooks as _hooks
from torch.nn.modules.module import _global_forward_pre_hooks as _pre_hooks

from graftq.quant_linear.gpu.dispatch_bypass import is_unwatched
from graftq.quant_linear.gpu.tiled_layout import PADDED_N, TiledLayout
from graftq.quant_linear.linear import QuantLinear
from graftq.quant_linear.row_order import can_multiply_as_one
from graftq.quant_linear.spec import QuantSpec

logger = logging.getLogger(__name__)

_SIDE_BY_SIDE = {"codes": 0, "high": 0, "scales": 1, "zeros": 1, "qzeros": 1, "bias": 0}
"""The dimension of outputs in the tensors of ``TiledLayout`` that have one."""


def join_siblings(layers: Sequence[QuantLinear]) -> bool:
    """Let the first of ``layers`` multiply for all, if they allow it: same kernel, same act-order, nothing padded.

    Call it once they are bound. The layers are expected to be called in this order, each with the same tensor. If they
    are not, they go back to multiplying one by one. While gradients are recorded they always multiply one by one.

    Returns:
        Whether they were joined.
    """
    if len(layers) < 2 or not _can_join(layers):
        return False
    for name, dimension in _SIDE_BY_SIDE.items():
        tensors = [layer.packed().get(name) for layer in layers]
        if tensors[0] is None:
            continue
        whole = torch.cat([tensor for tensor in tensors if tensor is not None], dimension)
        start = 0
        for layer, tensor in zip(layers, tensors, strict=True):
            assert tensor is not None
            width = tensor.shape[dimension]
            layer.hold({name: whole.narrow(dimension, start, width) if start else whole})
            start += width
    shared = SiblingProduct(layers)
    for place, layer in enumerate(layers):
        layer.shared = (shared, place)
    return True


def _can_join(layers: Sequence[QuantLinear]) -> bool:
    first = layers[0]
    g_idx, kind = first.packed().get("g_idx"), _kind(first)
    return all(
        layer.shared is None
        and isinstance(layer.layout, TiledLayout)
        and _kind(layer) == kind
        and layer.spec.padded_out == layer.spec.out_features
        and layer.spec.out_features % PADDED_N == 0
        and can_multiply_as_one(first.spec, g_idx, layer.spec, layer.packed().get("g_idx"))
        for layer in layers
    )


def _kind(layer: QuantLinear) -> tuple[object, ...]:
    """What the kernel wants joined layers to have in common, besides what one product needs anyway."""
    packed = layer.packed()
    tensors = [packed.get(name) for name in ("codes", "scales", "bias")]
    stored = [None if tensor is None else (tensor.device, tensor.dtype) for tensor in tensors]
    return (type(layer.provider), layer.dtype, layer.spec.sym, layer.spec.has_bias, layer.form, *stored)


class SiblingProduct:
    """The product of joined layers, and the parts of its output that are still to be fetched.

    That the layers are called with the same tensor does not say that it still holds the same values. So the first
    time the values are compared, eagerly: what comes before that, compiled, traced or captured, multiplies one by one.
    From then on the tensor's version is, which every change in place raises. Hooks can make changes that raise none, so
    a layer that has one multiplies by itself, as all do for tensors that have no version (of inference mode).

    ::

        unproven, idle --first called, eagerly--> unproven, waiting (x, its version, outputs, a copy of x's values)
              |                                         |  others called in turn with the same x and values,
              | called while compiled,                  |  the last of them fetches its output
              | traced or captured: each                v
              | multiplies by itself             proven, idle <-----------------+
              | (no change of state)                    |                       | the last one fetches
              |                                         | first called          | its output
              |                                         v                       |
              |                                  proven, waiting (x, its version, outputs)
              |                                         |
              +---- any other call, any state: ---------+
                    dissolved for good; each layer multiplies by itself

    A call's state is one attribute, replaced as a whole, and read once per call: threads that interleave their calls
    find another thread's ``x``, and dissolve it.

    The layers hold this object, and it holds them weakly: a cycle would keep their memory after ``del model``.
    """

    def __init__(self, layers: Sequence[QuantLinear]):
        self._layers = [weakref.ref(layer) for layer in layers]
        self._widths = [layer.out_features for layer in layers]
        total, spec = sum(self._widths), layers[0].spec
        self._spec = replace(spec, out_features=total, padded_out=total, stored_bias=total if spec.has_bias else 0)
        self._waiting: tuple[torch.Tensor, int, tuple[torch.Tensor, ...], torch.Tensor | None] | None = None
        self._is_proven = False

    def __call__(self, layer: QuantLinear, place: int, x: torch.Tensor) -> torch.Tensor:
        """What ``layer``, the one at ``place``, returns for ``x``."""
        if not self._is_proven and (not is_unwatched(x) or _is_capturing(x)):
            return layer.multiply(x, layer.spec)
        if not torch.compiler.is_compiling() and x.is_inference():
            return layer.multiply(x, layer.spec)
        if _is_hooked(layer):
            self.dissolve("something is hooked to one of them")
            return layer.multiply(x, layer.spec)
        waiting = self._waiting
        if place == 0 and waiting is None:
            outputs = torch.split_with_sizes(layer.multiply(x, self._spec), self._widths, -1)
            self._waiting = (x, _version(x), outputs, None if self._is_proven else _bits(x).clone())
            return outputs[0]
        if place > 0 and waiting is not None:
            input_, version, outputs, values = waiting
            if input_ is x and version == _version(x) and (values is None or torch.equal(values, _bits(x))):
                if place == len(self._widths) - 1:
                    self._waiting = None
                    self._is_proven = True
                return outputs[place]
        self.dissolve("they are not called one after the other with the same input")
        return layer.multiply(x, layer.spec)

    def spec_at(self, place: int) -> QuantSpec | None:
        """All layers' outputs at the first place, nothing at the others."""
        return self._spec if place == 0 else None

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which weak references do not survive."""
        return {**self.__dict__, "_layers": self._alive()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = {**state, "_layers": [weakref.ref(layer) for layer in state["_layers"]]}

    def _alive(self) -> list[QuantLinear]:
        return [layer for reference in self._layers if (layer := reference()) is not None]

    def dissolve(self, reason: str) -> None:
        """Let each layer multiply by itself from now on."""
        self._waiting = None
        for layer in self._alive():
            layer.shared = None
        if not torch.compiler.is_compiling():
            logger.debug("layers of %s outputs multiply one by one from now on: %s", self._widths, reason)


def _version(x: torch.Tensor) -> int:
    """How often ``x`` was changed in place; always 0 where a graph is compiled, which has no number for it.

    A graph is compiled of the calls that an eager one has proven, and of hooks, which are looked at then, too.
    """
    return 0 if torch.compiler.is_compiling() else x._version


def _is_hooked(layer: QuantLinear) -> bool:
    """Whether anything runs before or after the layer's own ``forward`` that may change values unseen.

    accelerate's hook that aligns devices stands in for ``forward``, and changes none.
    """
    own = layer.__dict__
    hook = own.get("_hf_hook")
    is_replaced = "forward" in own and type(hook).__name__ != "AlignDevicesHook"
    return bool(own["_forward_pre_hooks"] or own["_forward_hooks"] or is_replaced or _pre_hooks or _hooks)


def _bits(x: torch.Tensor) -> torch.Tensor:
    """The values' bits as integers, since NaN does not equal itself."""
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize])


def _is_capturing(x: torch.Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()
