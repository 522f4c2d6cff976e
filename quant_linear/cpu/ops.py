"""The quantized linear layer on a CPU, as operators of ``torch.ops.graftq`` that ``torch.compile`` sees whole.

Few tokens go through torch's int4 and int8 kernels, which read the weights as they are and compute in bf16 with
float32 sums. Many tokens, and float32, go through tiles: some output rows are dequantized into a workspace and
multiplied there.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch

from graftq.quant_linear.cpu.dequantized_matmul import CpuWeights, multiply_tiles_transposed
from graftq.quant_linear.cpu.kernels import multiply, multiply_runs

_WEIGHTS = (
    "Tensor codes, Tensor scales_and_zeros, Tensor groups, Tensor scales, Tensor qzeros, Tensor? order, Tensor? bias, "
    "int bits, bool sym, int zero_offset"
)
_LARGEST = torch.iinfo(torch.int32).max
_library = torch.library.Library("graftq", "FRAGMENT")
_library.define(f"cpu_linear(Tensor x, {_WEIGHTS}, int out_features) -> Tensor")
_library.define(f"cpu_linear_input_grad(Tensor grad, {_WEIGHTS}, SymInt[] shape) -> Tensor")
_ROWS = "Tensor? token, Tensor expert"
_library.define(f"cpu_experts_linear(Tensor x, {_ROWS}, {_WEIGHTS}, int out_features) -> Tensor")
_library.define(f"cpu_experts_linear_input_grad(Tensor grad, {_ROWS}, {_WEIGHTS}, SymInt[] shape) -> Tensor")


def _linear(x: torch.Tensor, *arguments: object) -> torch.Tensor:
    """``x @ W.T + bias`` for ``x`` [M, K]: [M, N] in its dtype. Arguments: :class:`CpuWeights`, then N."""
    w, n = CpuWeights(*arguments[:-1]), arguments[-1]  # type: ignore[arg-type]
    assert isinstance(n, int)
    out = multiply(_placed(x, w), w, n)
    if w.bias is not None:
        out = out + w.bias[:n].to(out.dtype)
    return out.to(x.dtype)


def _placed(x: torch.Tensor, w: CpuWeights) -> torch.Tensor:
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
    """``grad @ W`` for ``grad`` [M, N]: [M, K], summed in float32. Arguments: :class:`CpuWeights`, then (M, K)."""
    w, shape = CpuWeights(*arguments[:-1]), arguments[-1]  # type: ignore[arg-type]
    assert isinstance(shape, Sequence)
    return _unplaced(multiply_tiles_transposed(grad, w), w.order, shape[1]).to(grad.dtype)


def _unplaced(total: torch.Tensor, order: torch.Tensor | None, k: int) -> torch.Tensor:
    """The inverse of placing, for gradients: [M, rows] to [M, k]."""
    if order is not None:
        scattered = total.new_zeros(len(total), k + 1)  # one column more, for what padding received
        total = scattered.index_copy_(1, order.long(), total)
    return total[:, :k]


def _runs(expert: torch.Tensor, count: int) -> list[tuple[int, int]]:
    """(expert, rows) of each run of equal values of ``expert`` [S], ascending, but those from ``count`` on."""
    return [(number, len(list(run))) for number, run in groupby(expert.tolist()) if number < count]


def _experts_linear(
    x: torch.Tensor, token: torch.Tensor | None, expert: torch.Tensor, *arguments: object
) -> torch.Tensor:
    """Row ``token[s]`` of ``x`` [R, K] (s, if None) by the weights of ``expert[s]``, ascending: [S, N].

    Zeros for experts that the weights have not: other ranks'. Arguments: :class:`CpuWeights`, then N.
    """
    w, n = CpuWeights(*arguments[:-1]), arguments[-1]  # type: ignore[arg-type]
    assert isinstance(n, int)
    runs = _runs(expert, len(w.codes))
    if not runs:
        return x.new_zeros(len(expert), n)
    missing = len(expert) - sum(rows for _, rows in runs)
    if missing:
        expert = expert[:-missing]
        token, x = (None, x[:-missing]) if token is None else (token[:-missing], x)
    out = multiply_runs(_placed_by_expert(x, token, expert, w), w, n, runs)
    if w.bias is not None:
        out = out + w.bias.index_select(0, expert)[:, :n]
    out = out.to(x.dtype)
    return torch.nn.functional.pad(out, (0, 0, 0, missing)) if missing else out


def _placed_by_expert(x: torch.Tensor, token: torch.Tensor | None, expert: torch.Tensor, w: CpuWeights) -> torch.Tensor:
    """Rows ``token`` [S] of ``x`` (all, if None), each in the packed order of its ``expert``: [S, rows]."""
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
    grad: torch.Tensor, token: torch.Tensor | None, expert: torch.Tensor, *arguments: object
) -> torch.Tensor:
    """To ``x`` of :func:`_experts_linear`, from ``grad`` [S, N]: [R, K]. Arguments: weights, then (R, K)."""
    w, shape = CpuWeights(*arguments[:-1]), arguments[-1]  # type: ignore[arg-type]
    assert isinstance(shape, Sequence)
    total = grad.new_zeros(shape, dtype=torch.float32)
    token = torch.arange(len(grad), device=grad.device) if token is None else token
    start = 0
    for number, rows in _runs(expert, len(w.codes)):
        run = slice(start, start + rows)
        start += rows
        order = None if w.order is None else w.order[number]
        found = multiply_tiles_transposed(grad[run], w.of(number))
        total.index_add_(0, token[run], _unplaced(found, order, shape[1]))
    return total.to(grad.dtype)


def product(name: str, x: torch.Tensor, *arguments: object) -> torch.Tensor:
    """The operator of this name, differentiable in ``x``."""
    if x.requires_grad and torch.is_grad_enabled():
        return _Product.apply(name, x, *arguments)
    return getattr(torch.ops.graftq, name)(x, *arguments)


class _Product(torch.autograd.Function):
    """An operator with a gradient to the activations; the weights are frozen."""

    @staticmethod
    def forward(ctx, name, x, *arguments):
        """The operator's name and arguments, which end in bits, sym, zero_offset and out_features."""
        ctx.save_for_backward(*arguments[:-4])
        ctx.name, ctx.numbers, ctx.count = name, (*arguments[-4:-1], x.shape), len(arguments)
        return getattr(torch.ops.graftq, name)(x, *arguments)

    @staticmethod
    def backward(ctx, grad):
        """To ``x`` alone."""
        dx = getattr(torch.ops.graftq, f"{ctx.name}_input_grad")(grad, *ctx.saved_tensors, *ctx.numbers)
        return None, dx, *[None] * ctx.count


_library.impl("cpu_linear", _linear, "CompositeExplicitAutograd")
_library.impl("cpu_linear_input_grad", _input_grad, "CompositeExplicitAutograd")
_library.impl("cpu_experts_linear", _experts_linear, "CompositeExplicitAutograd")
_library.impl("cpu_experts_linear_input_grad", _experts_input_grad, "CompositeExplicitAutograd")


@torch.library.register_fake("graftq::cpu_linear", lib=_library)
def _(x: torch.Tensor, *arguments: object) -> torch.Tensor:
    return x.new_empty(x.shape[0], arguments[-1])  # type: ignore[call-overload]


@torch.library.register_fake("graftq::cpu_experts_linear", lib=_library)
def _(x: torch.Tensor, token: torch.Tensor | None, expert: torch.Tensor, *arguments: object) -> torch.Tensor:
    return x.new_empty(expert.shape[0], arguments[-1])  # type: ignore[call-overload]


@torch.library.register_fake("graftq::cpu_linear_input_grad", lib=_library)
@torch.library.register_fake("graftq::cpu_experts_linear_input_grad", lib=_library)
def _(grad: torch.Tensor, *arguments: object) -> torch.Tensor:
    return grad.new_empty(arguments[-1])  # type: ignore[call-overload]
