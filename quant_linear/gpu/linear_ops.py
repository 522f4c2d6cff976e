"""The tiled linear layer as operators of ``torch.ops.graftq``: what ``torch.compile`` and CUDA graphs see.

The library is defined by hand rather than by ``torch.library.custom_op``: that costs a call several microseconds more,
which is what a decode step has least of.
"""

from __future__ import annotations

import torch

from graftq.quant_linear.gpu.dequantized_weights import TiledWeights, dequantized_runs
from graftq.quant_linear.gpu.dispatch_bypass import on_its_device
from graftq.quant_linear.gpu.linear_launches import launches_for
from graftq.quant_linear.spec import QuantSpec

_WEIGHTS = "Tensor codes, Tensor? high, Tensor scales, Tensor? qzeros, Tensor? order, Tensor? bias, str signature"
_library = torch.library.Library("graftq", "FRAGMENT")
_library.define(f"tiled_linear(Tensor x, {_WEIGHTS}) -> Tensor")
_library.define(f"tiled_linear_input_grad(Tensor grad, {_WEIGHTS}) -> Tensor")


@on_its_device
def tiled_linear(x: torch.Tensor, *arguments: object) -> torch.Tensor:
    """``x @ W.T + bias`` for ``x`` [..., K], fp16 or bf16; [..., N]. Arguments: weights, signature."""
    *weights, signature = arguments
    codes, _, scales, qzeros, order, bias = weights
    product = launches_for(
        signature,
        x.shape,
        x.stride(),
        x.dtype,
        x.device,
        codes.shape[1],  # type: ignore[attr-defined]
        scales.shape[0],  # type: ignore[attr-defined]
        scales.stride(0),  # type: ignore[attr-defined]
        0 if qzeros is None else qzeros.stride(0),  # type: ignore[attr-defined]
        scales.dtype,  # type: ignore[attr-defined]
        None if bias is None else bias.dtype,  # type: ignore[attr-defined]
        order is not None,
    )
    return product(x, weights)  # type: ignore[arg-type]


@on_its_device
def _tiled_linear_input_grad(grad: torch.Tensor, *arguments: object) -> torch.Tensor:
    """``grad @ W`` for ``grad`` [..., N]: [..., K], summed over runs of N in its dtype. Arguments: likewise."""
    weights, spec = TiledWeights(*arguments[:-1]), QuantSpec.parse(arguments[-1])  # type: ignore[arg-type]
    rows, k = grad.reshape(-1, spec.out_features), spec.in_features
    total = grad.new_zeros(len(rows), weights.codes.shape[1] * 128)
    for first, run in dequantized_runs(weights, spec, grad.dtype):
        total.addmm_(rows[:, first : first + len(run)], run)
    if weights.order is not None:
        scattered = grad.new_empty(len(rows), k + 1)  # one column more, for what padding received
        total = scattered.index_copy_(1, weights.order.clamp(max=k).long(), total)
    return total[:, :k].contiguous().view(*grad.shape[:-1], k)


class TiledLinear(torch.autograd.Function):
    """``tiled_linear`` with a gradient to the activations; the weights are frozen.

    Not registered for the operator itself: that costs each call some 10 us of Python, gradient or not.
    """

    @staticmethod
    def forward(ctx, x, *arguments):
        """Arguments as for ``tiled_linear``."""
        ctx.save_for_backward(*arguments[:-1])
        ctx.signature = arguments[-1]
        return torch.ops.graftq.tiled_linear(x, *arguments)

    @staticmethod
    def backward(ctx, grad):
        """To ``x`` alone."""
        return torch.ops.graftq.tiled_linear_input_grad(grad, *ctx.saved_tensors, ctx.signature), *[None] * 7


_library.impl("tiled_linear", tiled_linear, "CompositeExplicitAutograd")
_library.impl("tiled_linear_input_grad", _tiled_linear_input_grad, "CompositeExplicitAutograd")


@torch.library.register_fake("graftq::tiled_linear", lib=_library)
def _(x: torch.Tensor, *arguments: object) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], QuantSpec.parse(arguments[-1]).out_features)


@torch.library.register_fake("graftq::tiled_linear_input_grad", lib=_library)
def _(grad: torch.Tensor, *arguments: object) -> torch.Tensor:
    return grad.new_empty(*grad.shape[:-1], QuantSpec.parse(arguments[-1]).in_features)
