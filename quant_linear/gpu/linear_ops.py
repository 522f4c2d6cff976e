"""The tiled linear layer as operators of ``torch.ops.graftq``: what ``torch.compile`` and CUDA graphs see.

The operators are defined by hand rather than by ``torch.library.custom_op``, which costs each call several more
microseconds of host time; a decode step makes hundreds of these calls.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graftq.quant_linear.gpu.dequantized_weights import TiledWeights, dequantized_runs
from graftq.quant_linear.gpu.dispatch_bypass import on_its_device
from graftq.quant_linear.gpu.linear_launches import LinearKey, launches_for
from graftq.quant_linear.spec import QuantSpec

_WEIGHTS = "Tensor codes, Tensor? high, Tensor scales, Tensor? zeros, Tensor? order, Tensor? bias, str signature"
# The operators exist as long as this object does. "FRAGMENT", since several modules define operators of `graftq`.
_library = torch.library.Library("graftq", "FRAGMENT")
_library.define(f"tiled_linear(Tensor x, {_WEIGHTS}) -> Tensor")
_library.define(f"tiled_linear_input_grad(Tensor grad, {_WEIGHTS}) -> Tensor")


@on_its_device
def tiled_linear(
    x: Tensor, codes: Tensor, high: Tensor | None, scales: Tensor, zeros: Tensor | None, order: Tensor | None,
    bias: Tensor | None, signature: str,
) -> Tensor:  # fmt: skip
    """``x @ W.T + bias``: [..., N] in the dtype of ``x``, contiguous.

    Args:
        x: fp16 or bf16 [..., K], any strides.
        codes, high, scales, zeros, order, bias: The tensors of ``TiledLayout``; ``zeros`` None if symmetric.
        signature: ``QuantSpec.signature``.

    Raises:
        RuntimeError: The last dimension of ``x`` is not K.
    """
    weights = tuple.__new__(TiledWeights, (codes, high, scales, zeros, order, bias))
    return launches_for(LinearKey.of(x, weights, signature)).run(x, weights)


@on_its_device
def _tiled_linear_input_grad(
    grad: Tensor, codes: Tensor, high: Tensor | None, scales: Tensor, zeros: Tensor | None, order: Tensor | None,
    bias: Tensor | None, signature: str,
) -> Tensor:  # fmt: skip
    """The gradient of ``x``: ``grad @ W`` [..., K] for ``grad`` [..., N], summed over N in the dtype of ``grad``.

    Other arguments as for :func:`tiled_linear`.
    """
    weights, spec = TiledWeights(codes, high, scales, zeros, order, bias), QuantSpec.parse(signature)
    rows, k = grad.reshape(-1, spec.out_features), spec.in_features
    total = grad.new_zeros(len(rows), codes.shape[1] * 128)
    for first, run in dequantized_runs(weights, spec, grad.dtype):
        total.addmm_(rows[:, first : first + len(run)], run)
    if order is not None:
        scattered = grad.new_empty(len(rows), k + 1)  # the last column takes the gradient of padding
        total = scattered.index_copy_(1, order.clamp(max=k).long(), total)
    return total[:, :k].contiguous().view(*grad.shape[:-1], k)


class TiledLinear(torch.autograd.Function):
    """``tiled_linear`` with a gradient to the activations; the weights are frozen.

    Not registered as the operator's own gradient: that costs each call some 10 us of Python, gradient or not.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codes: Tensor, high: Tensor | None, scales: Tensor, zeros: Tensor | None,
        order: Tensor | None, bias: Tensor | None, signature: str,
    ) -> Tensor:  # fmt: skip
        """Arguments as for :func:`tiled_linear`."""
        ctx.save_for_backward(codes, high, scales, zeros, order, bias)
        ctx.signature = signature
        return torch.ops.graftq.tiled_linear(x, codes, high, scales, zeros, order, bias, signature)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """To ``x`` alone."""
        dx = torch.ops.graftq.tiled_linear_input_grad(grad, *ctx.saved_tensors, ctx.signature)
        return dx, *[None] * (len(TiledWeights._fields) + 1)


_library.impl("tiled_linear", tiled_linear, "CompositeExplicitAutograd")
_library.impl("tiled_linear_input_grad", _tiled_linear_input_grad, "CompositeExplicitAutograd")


@torch.library.register_fake("graftq::tiled_linear", lib=_library)
def _(
    x: Tensor, codes: Tensor, high: Tensor | None, scales: Tensor, zeros: Tensor | None, order: Tensor | None,
    bias: Tensor | None, signature: str,
) -> Tensor:  # fmt: skip
    return x.new_empty(*x.shape[:-1], QuantSpec.parse(signature).out_features)


@torch.library.register_fake("graftq::tiled_linear_input_grad", lib=_library)
def _(
    grad: Tensor, codes: Tensor, high: Tensor | None, scales: Tensor, zeros: Tensor | None, order: Tensor | None,
    bias: Tensor | None, signature: str,
) -> Tensor:  # fmt: skip
    return grad.new_empty(*grad.shape[:-1], QuantSpec.parse(signature).in_features)
