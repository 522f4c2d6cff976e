"""The quantised linear layer on a CPU, as operators of ``torch.ops.graftq`` that ``torch.compile`` sees whole.

Few tokens go through torch's int4 and int8 kernels, which read the weights as they are and compute in bf16 with
float32 sums. Many tokens, and float32, go through tiles: some output rows are dequantised into a workspace and
multiplied there.
"""

from __future__ import annotations

from itertools import groupby

import torch

from graftq.quant_linear.cpu_kernels import multiply
from graftq.quant_linear.cpu_tiles import Weights, multiply_tiles_transposed

_WEIGHTS = (
    "Tensor codes, Tensor scales_and_zeros, Tensor groups, Tensor scales, Tensor qzeros, Tensor? order, Tensor? bias, "
    "int bits, bool sym, int zero_offset"
)
_LARGEST = torch.iinfo(torch.int32).max
_library = torch.library.Library("graftq", "FRAGMENT")
_library.define(f"cpu_linear(Tensor x, {_WEIGHTS}, int out_features) -> Tensor")
_library.define(f"cpu_linear_input_grad(Tensor grad, {_WEIGHTS}, int in_features) -> Tensor")
_library.define(f"cpu_experts_linear(Tensor x, Tensor index, {_WEIGHTS}, int out_features) -> Tensor")
_library.define(f"cpu_experts_linear_input_grad(Tensor grad, Tensor index, {_WEIGHTS}, int in_features) -> Tensor")


def _linear(x: torch.Tensor, *arguments: object) -> torch.Tensor:
    """``x @ W.T + bias`` for ``x`` [M, K]: [M, N] in its dtype. Arguments: :class:`Weights`, then N."""
    w, n = Weights(*arguments[:-1]), arguments[-1]  # type: ignore[arg-type]
    assert isinstance(n, int)
    out = multiply(_placed(x, w), w, n)
    if w.bias is not None:
        out = out + w.bias[:n].to(out.dtype)
    return out.to(x.dtype)


def _placed(x: torch.Tensor, w: Weights) -> torch.Tensor:
    """``x`` [M, K] in packed order, zeros where there is padding: [M, rows]."""
    padding = w.rows - x.shape[1]
    if w.order is None:
        return torch.nn.functional.pad(x, (0, padding)) if padding else x.contiguous()
    if padding:
        x = torch.nn.functional.pad(x, (0, 1))
    if len(x) == 1:
        return x[0].index_select(0, w.order)[None]
    # Whole rows of the transposed are several times as fast to gather as single columns are.
    return x.t().contiguous().index_select(0, w.order).t().contiguous()


def _input_grad(grad: torch.Tensor, *arguments: object) -> torch.Tensor:
    """``grad @ W`` for ``grad`` [M, N]: [M, K], summed in float32. Arguments: :class:`Weights`, then K."""
    w, k = Weights(*arguments[:-1]), arguments[-1]  # type: ignore[arg-type]
    assert isinstance(k, int)
    return _unplaced(multiply_tiles_transposed(grad, w), w.order, k).to(grad.dtype)


def _unplaced(total: torch.Tensor, order: torch.Tensor | None, k: int) -> torch.Tensor:
    """The inverse of placing, for gradients: [M, rows] to [M, k]."""
    if order is not None:
        scattered = total.new_zeros(len(total), k + 1)  # one column more, for what padding received
        total = scattered.index_copy_(1, order.long(), total)
    return total[:, :k]


def _runs(chosen: torch.Tensor, experts: int) -> list[tuple[int | None, int, int]]:
    """(expert, start, stop) of each run of equal values; None for those of other ranks."""
    runs: list[tuple[int | None, int, int]] = []
    stop = 0
    for expert, group in groupby(chosen.tolist()):
        start, stop = stop, stop + len(list(group))
        runs.append((expert if expert < experts else None, start, stop))
    return runs


def _experts_linear(x: torch.Tensor, index: torch.Tensor, *arguments: object) -> torch.Tensor:
    """Row r of ``x`` [R, K] by the weights of each expert in row r of ``index`` [R, J]: [R, J, N], 0 for sentinels."""
    w, n = Weights(*arguments[:-1]), arguments[-1]  # type: ignore[arg-type]
    assert isinstance(n, int)
    rows, slots = index.shape
    chosen, by_expert = index.flatten().sort(stable=True)
    known = chosen.clamp(max=len(w.codes) - 1)
    placed = _placed_by_expert(x, by_expert.div(slots, rounding_mode="floor"), known, w)
    outputs = [
        x.new_zeros(stop - start, n) if expert is None else multiply(placed[start:stop], w, n, expert).to(x.dtype)
        for expert, start, stop in _runs(chosen, len(w.codes))
    ]
    out = x.new_empty(rows * slots, n)
    if outputs:
        found = torch.cat(outputs)
        if w.bias is not None:
            bias = w.bias.index_select(0, known)[:, :n]
            found = (found + bias).masked_fill((chosen >= len(w.codes))[:, None], 0).to(x.dtype)
        out.index_copy_(0, by_expert, found)
    return out.view(rows, slots, n)


def _placed_by_expert(x: torch.Tensor, token: torch.Tensor, expert: torch.Tensor, w: Weights) -> torch.Tensor:
    """Rows ``token`` [S] of ``x``, each in the packed order of its ``expert``: [S, rows]."""
    padding = w.rows - x.shape[1]
    if w.order is None:
        return torch.nn.functional.pad(x, (0, padding)).index_select(0, token)
    if padding:
        x = torch.nn.functional.pad(x, (0, 1))
    place = w.order.index_select(0, expert)
    if len(x) > 1:
        first = token[:, None] * x.shape[1]
        place = place + (first if x.numel() > _LARGEST else first.to(place.dtype))
    return x.flatten().index_select(0, place.flatten()).view(len(token), w.rows)


def _experts_input_grad(grad: torch.Tensor, index: torch.Tensor, *arguments: object) -> torch.Tensor:
    """To ``x`` of :func:`_experts_linear`, from ``grad`` [R, J, N]: [R, K]. Arguments: :class:`Weights`, then K."""
    w, k = Weights(*arguments[:-1]), arguments[-1]  # type: ignore[arg-type]
    assert isinstance(k, int)
    chosen, by_expert = index.flatten().sort(stable=True)
    total = grad.new_zeros(len(index), k, dtype=torch.float32)
    for expert, start, stop in _runs(chosen, len(w.codes)):
        if expert is not None:
            slots = by_expert[start:stop]
            found = multiply_tiles_transposed(grad.flatten(0, 1).index_select(0, slots), w.of(expert))
            found = _unplaced(found, None if w.order is None else w.order[expert], k)
            total.index_add_(0, slots.div(index.shape[1], rounding_mode="floor"), found)
    return total.to(grad.dtype)


class CpuLinear(torch.autograd.Function):
    """``cpu_linear`` with a gradient to the activations; the weights are frozen."""

    @staticmethod
    def forward(ctx, x, *arguments):
        """Arguments as for ``cpu_linear``."""
        ctx.save_for_backward(*arguments[:7])
        ctx.numbers = (*arguments[7:-1], x.shape[1])
        return torch.ops.graftq.cpu_linear(x, *arguments)

    @staticmethod
    def backward(ctx, grad):
        """To ``x`` alone."""
        dx = torch.ops.graftq.cpu_linear_input_grad(grad, *ctx.saved_tensors, *ctx.numbers)
        return (dx, *[None] * 11)


class CpuExpertsLinear(torch.autograd.Function):
    """``cpu_experts_linear`` with a gradient to the activations; the weights are frozen."""

    @staticmethod
    def forward(ctx, x, *arguments):
        """Arguments as for ``cpu_experts_linear``."""
        ctx.save_for_backward(*arguments[:8])
        ctx.numbers = (*arguments[8:-1], x.shape[1])
        return torch.ops.graftq.cpu_experts_linear(x, *arguments)

    @staticmethod
    def backward(ctx, grad):
        """To ``x`` alone."""
        dx = torch.ops.graftq.cpu_experts_linear_input_grad(grad, *ctx.saved_tensors, *ctx.numbers)
        return (dx, *[None] * 12)


_library.impl("cpu_linear", _linear, "CompositeExplicitAutograd")
_library.impl("cpu_linear_input_grad", _input_grad, "CompositeExplicitAutograd")
_library.impl("cpu_experts_linear", _experts_linear, "CompositeExplicitAutograd")
_library.impl("cpu_experts_linear_input_grad", _experts_input_grad, "CompositeExplicitAutograd")


@torch.library.register_fake("graftq::cpu_linear", lib=_library)
@torch.library.register_fake("graftq::cpu_linear_input_grad", lib=_library)
def _(x: torch.Tensor, *arguments: object) -> torch.Tensor:
    return x.new_empty(x.shape[0], arguments[-1])  # type: ignore[call-overload]


@torch.library.register_fake("graftq::cpu_experts_linear", lib=_library)
def _(x: torch.Tensor, index: torch.Tensor, *arguments: object) -> torch.Tensor:
    return x.new_empty(*index.shape, arguments[-1])  # type: ignore[call-overload]


@torch.library.register_fake("graftq::cpu_experts_linear_input_grad", lib=_library)
def _(grad: torch.Tensor, index: torch.Tensor, *arguments: object) -> torch.Tensor:
    return grad.new_empty(grad.shape[0], arguments[-1])  # type: ignore[call-overload]
