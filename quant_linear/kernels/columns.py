"""GPTQ's column loop for one block of columns, in one launch (``making.columns.round_block`` is the reference)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def round_kernel(
    values, target, unit, groups, scales, zeros, centered, errors,
    columns, N, value_stride, target_stride, error_stride, unit_stride, unit_row, unit_column, group_stride,
    scale_stride,
    TOP: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Round columns in order, and let the block's later ones make up for each error; grid (runs of outputs, batch).

    To be launched without fusing products with sums, for the bits that torch gives.

    Args:
        values: float32 [batch, columns, N], ``value_stride`` from one of the batch to the next: as the columns stand.
        target: float32 [batch, columns, N], ``target_stride`` apart: what is approximated.
        unit: float32 [batch, columns, columns], ``unit_stride`` apart, rows ``unit_row`` and columns
            ``unit_column`` apart.
        groups: int64 [batch, columns], ``group_stride`` apart: each column's group.
        scales, zeros: float32 [batch, groups, N], ``scale_stride`` apart.
        centered: float32 [batch, columns, N], ``error_stride`` apart, written: codes less zeros.
        errors: Likewise: targets less what the codes stand for.
        columns: At most BLOCK.
        N: Outputs.
        TOP: The largest code.
        OUTPUTS: Outputs of a program.
        BLOCK: A power of two.
    """
    batch = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    is_output = n < N
    place = tl.arange(0, BLOCK)
    is_column = place < columns
    rows = values + batch * value_stride + place.to(tl.int64)[:, None] * N + n[None, :]
    standing = tl.load(rows, mask=is_column[:, None] & is_output[None, :], other=0.0)  # [BLOCK, OUTPUTS]
    column = 0
    while column < columns:
        group = tl.load(groups + batch * group_stride + column)
        at = batch * scale_stride + group * N + n
        scale = tl.load(scales + at, mask=is_output, other=1.0)
        zero = tl.load(zeros + at, mask=is_output, other=0.0)
        value = tl.sum(tl.where((place == column)[:, None], standing, 0.0), 0)
        # Rounds to nearest even as torch does, within 2 ** 22; what is beyond the codes is cut off in any case.
        steps = tl.minimum(tl.maximum(tl.div_rn(value, scale), -1024.0), 1024.0)
        nearest = (steps + 12582912.0) - 12582912.0
        code = tl.minimum(tl.maximum(nearest + zero, 0.0), TOP) - zero
        here = column * N + n
        goal = tl.load(target + batch * target_stride + here, mask=is_output, other=0.0)
        error = goal - code * scale
        tl.store(centered + batch * error_stride + here, code, mask=is_output)
        tl.store(errors + batch * error_stride + here, error, mask=is_output)
        later = (place > column) & is_column
        row = tl.load(unit + batch * unit_stride + column * unit_row + place * unit_column, mask=later, other=0.0)
        standing += row[:, None] * error[None, :]
        column += 1
