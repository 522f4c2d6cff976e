"""The search for a group's scales, all candidates in one launch (``making.grid.Grid.search`` is the reference)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _error(
    weight, importance, scale, zero, columns, N, n, is_output, TOP: tl.constexpr, BLOCK: tl.constexpr,
    OUTPUTS: tl.constexpr,
):  # fmt: skip
    """The weighted squared error of rounding a group's columns, [OUTPUTS]."""
    total = tl.zeros((OUTPUTS,), tl.float32)
    first = 0
    while first < columns:
        place = first + tl.arange(0, BLOCK)
        is_column = place < columns
        at = weight + place.to(tl.int64)[:, None] * N + n[None, :]
        value = tl.load(at, mask=is_column[:, None] & is_output[None, :], other=0.0)
        weigh = tl.load(importance + place, mask=is_column, other=0.0)
        # Rounds to nearest even as torch does, within 2 ** 22; what is beyond the codes is cut off in any case.
        steps = tl.minimum(tl.maximum(tl.div_rn(value, scale[None, :]), -1024.0), 1024.0)
        nearest = (steps + 12582912.0) - 12582912.0
        code = tl.minimum(tl.maximum(nearest + zero[None, :], 0.0), TOP) - zero[None, :]
        off = code * scale[None, :] - value
        total += tl.sum(off * off * weigh[:, None], 0)
        first += BLOCK
    return total


@triton.jit
def search_kernel(
    weight, importance, low, factors, scales, zeros,
    columns, N, weight_stride, importance_stride,
    SMALLEST: tl.constexpr, LARGEST: tl.constexpr, STEPS: tl.constexpr,
    SYM: tl.constexpr, MIDDLE: tl.constexpr, ROUNDINGS: tl.constexpr, TOP: tl.constexpr,
    OUTPUTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Try every candidate, and keep the best; grid (batch, runs of outputs).

    To be launched without fusing products with sums.

    Args:
        weight: float32 [batch, columns, N], ``weight_stride`` from one of the batch to the next.
        importance: float32 [batch, columns], ``importance_stride`` apart.
        low: float32 [batch, N], the least of each output's weights and zero.
        factors: float32 [STEPS], of the scale that covers the range.
        scales, zeros: float32 [batch, N], those that cover the range; replaced by the best.
        columns: Of the group.
        N: Outputs.
        SMALLEST, LARGEST: Magnitudes of scales.
        STEPS: Scales tried, of each sign.
        SYM: Whether zeros are fixed at MIDDLE, and scales of both signs are tried.
        ROUNDINGS: Candidates of a step: signs of a symmetric grid, or zeros of an asymmetric one, the nearest first,
            then the one below and the one above.
        TOP: The largest code.
        OUTPUTS: Outputs of a program.
        BLOCK: Columns at once.
    """
    batch = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    is_output = n < N
    weight += batch * weight_stride
    importance += batch * importance_stride
    at = batch * N + n
    plain = tl.load(scales + at, mask=is_output, other=1.0)
    best_scale, best_zero = plain, tl.load(zeros + at, mask=is_output, other=0.0)
    lowest = tl.load(low + at, mask=is_output, other=0.0)
    least = _error(weight, importance, best_scale, best_zero, columns, N, n, is_output, TOP, BLOCK, OUTPUTS)
    for candidate in range(STEPS * ROUNDINGS):
        factor = tl.load(factors + candidate // ROUNDINGS)
        scale = tl.minimum(tl.maximum(plain * factor, SMALLEST), LARGEST).to(tl.float16).to(tl.float32)
        which = candidate % ROUNDINGS
        if SYM:
            zero = tl.zeros_like(scale) + MIDDLE
            scale = tl.where(which == 0, scale, -scale)
        else:
            exact = tl.div_rn(lowest * -factor, scale)
            exact = tl.minimum(tl.maximum(exact, -1024.0), 1024.0)
            nearest = (exact + 12582912.0) - 12582912.0
            zero = tl.where(which == 0, nearest, tl.where(which == 1, tl.floor(exact), tl.ceil(exact)))
            zero = tl.minimum(tl.maximum(zero, 1.0), TOP)
        found = _error(weight, importance, scale, zero, columns, N, n, is_output, TOP, BLOCK, OUTPUTS)
        better = found < least
        least = tl.where(better, found, least)
        best_scale = tl.where(better, scale, best_scale)
        best_zero = tl.where(better, zero, best_zero)
    tl.store(scales + at, best_scale, mask=is_output)
    tl.store(zeros + at, best_zero, mask=is_output)
