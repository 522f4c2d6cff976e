"""The quantized linear layer on a CPU, as operators of ``torch.ops.graftq`` that ``torch.compile`` sees whole.

Few tokens go through torch's int4 and int8 kernels, which read the weights as they are and compute in bf16 with
float32 sums. Many tokens, and float32, go through tiles: some output rows are dequantized into a workspace and
multiplied there.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from graftq.quant_linear.cpu.dequantized_matmul import CpuWeights, multiply_tiles_transposed
from graftq.quant_linear.cpu.kernels import multiply, multiply_runs

_WEIGHTS = (
    "Tensor codes, Tensor scales_and_zeros, Tensor groups, Tensor scales, Tensor qzeros, Tensor? order, Tensor? bias, "
    "int bits, bool sym, int zero_offset"
)
_ROWS = "Tensor? token, Tensor expert"
_LARGEST = torch.iinfo(torch.int32).max
# The operators exist as long as this object does. "FRAGMENT", since several modules define operators of `graftq`.
_library = torch.library.Library("graftq", "FRAGMENT")
_library.define(f"cpu_linear(Tensor x, {_WEIGHTS}, int out_features) -> Tensor")
_library.define(f"cpu_linear_input_grad(Tensor grad, {_WEIGHTS}, SymInt[] shape) -> Tensor")
_library.define(f"cpu_experts_linear(Tensor x, {_ROWS}, {_WEIGHTS}, int out_features) -> Tensor")
_library.define(f"cpu_experts_linear_input_grad(Tensor grad, {_ROWS}, {_WEIGHTS}, SymInt[] shape) -> Tensor")


def _linear(
    x: Tensor,
    codes: Tensor, scales_and_zeros: Tensor, groups: Tensor, scales: Tensor, qzeros: Tensor, order: Tensor | None,
    bias: Tensor | None, bits: int, sym: bool, zero_offset: int,
    out_features: int,
) -> Tensor:  # fmt: skip
    """``x @ W.T + bias`` for ``x`` [M, K]: [M, out_features] in its dtype. The weights are a :class:`CpuWeights`."""
    w = CpuWeights(codes, scales_and_zeros, groups, scales, qzeros, order, bias, bits, sym, zero_offset)
    out = multiply(_placed(x, w), w, out_features)
    if bias is not None:
        out = out + bias[:out_features].to(out.dtype)
    return out.to(x.dtype)


def _placed(x: Tensor, w: CpuWeights) -> Tensor:
    """``x`` [M, K] with its columns in packed order, and zeros for padding: [M, rows]."""
    padding = w.rows - x.shape[1]
    if w.order is None:
        return torch.nn.functional.pad(x, (0, padding)) if padding else x.contiguous()
    if padding:
        x = torch.nn.functional.pad(x, (0, 1))
    if len(x) == 1:
        return x[0].index_select(0, w.order)[None]
    # Gathering rows of the transposed matrix is several times as fast as gathering columns.
    return x.t().contiguous().index_select(0, w.order).t().contiguous()


def _input_grad(
    grad: Tensor,
    codes: Tensor, scales_and_zeros: Tensor, groups: Tensor, scales: Tensor, qzeros: Tensor, order: Tensor | None,
    bias: Tensor | None, bits: int, sym: bool, zero_offset: int,
    shape: Sequence[int],
) -> Tensor:  # fmt: skip
    """The gradient of ``x`` [M, K] = ``shape``: ``grad @ W`` for ``grad`` [M, N], summed in float32."""
    w = CpuWeights(codes, scales_and_zeros, groups, scales, qzeros, order, bias, bits, sym, zero_offset)
    return _unplaced(multiply_tiles_transposed(grad, w), order, shape[1]).to(grad.dtype)


def _unplaced(total: Tensor, order: Tensor | None, k: int) -> Tensor:
    """The inverse of :func:`_placed`, for gradients: [M, rows] to [M, k]."""
    if order is not None:
        scattered = total.new_zeros(len(total), k + 1)  # the last column takes the gradient of padding
        total = scattered.index_copy_(1, order.long(), total)
    return total[:, :k]


def _runs(expert: Tensor, count: int) -> list[tuple[int, int]]:
    """(expert, rows) of each run of equal values of ``expert`` [S], ascending; only experts below ``count``."""
    return [(number, len(list(run))) for number, run in groupby(expert.tolist()) if number < count]


def _experts_linear(
    x: Tensor, token: Tensor | None, expert: Tensor,
    codes: Tensor, scales_and_zeros: Tensor, groups: Tensor, scales: Tensor, qzeros: Tensor, order: Tensor | None,
    bias: Tensor | None, bits: int, sym: bool, zero_offset: int,
    out_features: int,
) -> Tensor:  # fmt: skip
    """Each slot's row of ``x`` by the weights of its expert: [S, out_features] in the dtype of ``x``.

    Args:
        x: [R, K].
        token: int64 [S], the row of ``x`` for each slot; None if slot s reads row s.
        expert: int64 [S], ascending: the expert of each slot. Slots whose expert has no weights here get zeros.
        others: A :class:`CpuWeights` of all experts.
    """
    w = CpuWeights(codes, scales_and_zeros, groups, scales, qzeros, order, bias, bits, sym, zero_offset)
    runs = _runs(expert, len(codes))
    if not runs:
        return x.new_zeros(len(expert), out_features)
    missing = len(expert) - sum(rows for _, rows in runs)
    if missing:
        expert = expert[:-missing]
        token, x = (None, x[:-missing]) if token is None else (token[:-missing], x)
    out = multiply_runs(_placed_by_expert(x, token, expert, w), w, out_features, runs)
    if bias is not None:
        out = out + bias.index_select(0, expert)[:, :out_features]
    out = out.to(x.dtype)
    return torch.nn.functional.pad(out, (0, 0, 0, missing)) if missing else out


def _placed_by_expert(x: Tensor, token: Tensor | None, expert: Tensor, w: CpuWeights) -> Tensor:
    """Rows ``token`` [S] of ``x`` (all if None), each in the packed order of its expert: [S, rows]."""
    padding = w.rows - x.shape[1]
    if w.order is None:
        placed = torch.nn.functional.pad(x, (0, padding)) if padding else x.contiguous()
        return placed if token is None else placed.index_select(0, token)
    if padding:
        x = torch.nn.functional.pad(x, (0, 1))
    place = w.order.index_select(0, expert)
    if len(x) > 1:
        token = torch.arange(len(x), device=x.device) if token is None else token
        first = token * x.shape[1]
        place = place + (first if x.numel() > _LARGEST else first.to(place.dtype))[:, None]
    return x.flatten().index_select(0, place.flatten()).view(len(expert), w.rows)


def _experts_input_grad(
    grad: Tensor, token: Tensor | None, expert: Tensor,
    codes: Tensor, scales_and_zeros: Tensor, groups: Tensor, scales: Tensor, qzeros: Tensor, order: Tensor | None,
    bias: Tensor | None, bits: int, sym: bool, zero_offset: int,
    shape: Sequence[int],
) -> Tensor:  # fmt: skip
    """The gradient of ``x`` [R, K] = ``shape`` in :func:`_experts_linear`, for ``grad`` [S, N], summed in float32."""
    w = CpuWeights(codes, scales_and_zeros, groups, scales, qzeros, order, bias, bits, sym, zero_offset)
    total = grad.new_zeros(shape, dtype=torch.float32)
    token = torch.arange(len(grad), device=grad.device) if token is None else token
    start = 0
    for number, rows in _runs(expert, len(codes)):
        run = slice(start, start + rows)
        start += rows
        own_order = None if order is None else order[number]
        found = multiply_tiles_transposed(grad[run], w.of(number))
        total.index_add_(0, token[run], _unplaced(found, own_order, shape[1]))
    return total.to(grad.dtype)


def cpu_linear(x: Tensor, weights: CpuWeights, out_features: int) -> Tensor:
    """``x @ W.T + bias`` for ``x`` [M, K]: [M, out_features] in its dtype; differentiable in ``x``."""
    if x.requires_grad and torch.is_grad_enabled():
        return _Linear.apply(x, *weights, out_features)
    return torch.ops.graftq.cpu_linear(x, *weights, out_features)


def cpu_experts_linear(
    x: Tensor, token: Tensor | None, expert: Tensor, weights: CpuWeights, out_features: int
) -> Tensor:
    """Each slot's row of ``x`` by the weights of its expert, differentiable in ``x``; see :func:`_experts_linear`."""
    if x.requires_grad and torch.is_grad_enabled():
        return _ExpertsLinear.apply(x, token, expert, *weights, out_features)
    return torch.ops.graftq.cpu_experts_linear(x, token, expert, *weights, out_features)


class _Linear(torch.autograd.Function):
    """``cpu_linear`` with a gradient to the activations; the weights are frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor,
        codes: Tensor, scales_and_zeros: Tensor, groups: Tensor, scales: Tensor, qzeros: Tensor, order: Tensor | None,
        bias: Tensor | None, bits: int, sym: bool, zero_offset: int,
        out_features: int,
    ) -> Tensor:  # fmt: skip
        tensors, integers = (codes, scales_and_zeros, groups, scales, qzeros, order, bias), (bits, sym, zero_offset)
        ctx.save_for_backward(*tensors)
        ctx.integers, ctx.shape = integers, x.shape
        return torch.ops.graftq.cpu_linear(x, *tensors, *integers, out_features)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx = torch.ops.graftq.cpu_linear_input_grad(grad, *ctx.saved_tensors, *ctx.integers, ctx.shape)
        return dx, *[None] * (len(CpuWeights._fields) + 1)


class _ExpertsLinear(torch.autograd.Function):
    """``cpu_experts_linear`` with a gradient to the activations; the weights are frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, token: Tensor | None, expert: Tensor,
        codes: Tensor, scales_and_zeros: Tensor, groups: Tensor, scales: Tensor, qzeros: Tensor, order: Tensor | None,
        bias: Tensor | None, bits: int, sym: bool, zero_offset: int,
        out_features: int,
    ) -> Tensor:  # fmt: skip
        tensors, integers = (codes, scales_and_zeros, groups, scales, qzeros, order, bias), (bits, sym, zero_offset)
        ctx.save_for_backward(token, expert, *tensors)
        ctx.integers, ctx.shape = integers, x.shape
        return torch.ops.graftq.cpu_experts_linear(x, token, expert, *tensors, *integers, out_features)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx = torch.ops.graftq.cpu_experts_linear_input_grad(grad, *ctx.saved_tensors, *ctx.integers, ctx.shape)
        return dx, None, None, *[None] * (len(CpuWeights._fields) + 1)


_library.impl("cpu_linear", _linear, "CompositeExplicitAutograd")
_library.impl("cpu_linear_input_grad", _input_grad, "CompositeExplicitAutograd")
_library.impl("cpu_experts_linear", _experts_linear, "CompositeExplicitAutograd")
_library.impl("cpu_experts_linear_input_grad", _experts_input_grad, "CompositeExplicitAutograd")


@torch.library.register_fake("graftq::cpu_linear", lib=_library)
def _(
    x: Tensor,
    codes: Tensor, scales_and_zeros: Tensor, groups: Tensor, scales: Tensor, qzeros: Tensor, order: Tensor | None,
    bias: Tensor | None, bits: int, sym: bool, zero_offset: int,
    out_features: int,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], out_features)


@torch.library.register_fake("graftq::cpu_experts_linear", lib=_library)
def _(
    x: Tensor, token: Tensor | None, expert: Tensor,
    codes: Tensor, scales_and_zeros: Tensor, groups: Tensor, scales: Tensor, qzeros: Tensor, order: Tensor | None,
    bias: Tensor | None, bits: int, sym: bool, zero_offset: int,
    out_features: int,
) -> Tensor:  # fmt: skip
    return x.new_empty(expert.shape[0], out_features)


@torch.library.register_fake("graftq::cpu_linear_input_grad", lib=_library)
def _(
    grad: Tensor,
    codes: Tensor, scales_and_zeros: Tensor, groups: Tensor, scales: Tensor, qzeros: Tensor, order: Tensor | None,
    bias: Tensor | None, bits: int, sym: bool, zero_offset: int,
    shape: Sequence[int],
) -> Tensor:  # fmt: skip
    return grad.new_empty(shape)


@torch.library.register_fake("graftq::cpu_experts_linear_input_grad", lib=_library)
def _(
    grad: Tensor, token: Tensor | None, expert: Tensor,
    codes: Tensor, scales_and_zeros: Tensor, groups: Tensor, scales: Tensor, qzeros: Tensor, order: Tensor | None,
    bias: Tensor | None, bits: int, sym: bool, zero_offset: int,
    shape: Sequence[int],
) -> Tensor:  # fmt: skip
    return grad.new_empty(shape)
