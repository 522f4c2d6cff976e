"""The column loop: round one column, let those not yet rounded make up for its error, go on."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch

from graftq.quant_linear.gpu.availability import can_compile
from graftq.quant_linear.gpu.devices import current
from graftq.quant_linear.making.grid import Grid
from graftq.quant_linear.making.products import product, split

WIDE = 1024
"""Columns whose errors go to all later ones in one matrix product."""

BLOCK = 128
"""Of these, columns between two smaller ones."""

OUTPUTS = 32
"""Outputs of one program of the kernel."""

Find = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]
"""From a group's columns as they stand, [batch, columns, N], and the group's number to its scales and zeros."""


def round_columns(
    target: torch.Tensor,
    unit: torch.Tensor,
    groups: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    grid: Grid,
    find: Find | None = None,
) -> torch.Tensor:
    """Round columns in order.

    Source: Frantar et al., GPTQ (2022), without its inverse. Among :data:`WIDE` columns, errors of those before come
    by one product per block; to all after them, theirs go by another.

    Args:
        target: float32 [batch, K, N], what is to be approximated, columns in rounding order.
        unit: :attr:`Factor.unit`.
        groups: int64 [batch, K], the group of each column.
        scales, zeros: float32 [batch, groups, N]; filled in here if there is ``find``.
        grid: The codes.
        find: Finds a group's scales when its first column comes; its columns must then follow each other.

    Returns:
        Centered codes, ``code - zero``, float32 [batch, K, N] in rounding order.
    """
    width = target.shape[1]
    centered, errors, values = torch.empty_like(target), torch.empty_like(target), target.clone()
    starts = _group_starts(groups[0]) if find is not None else {}
    begin = 0  # errors of the columns before it are in all values
    for first, last in _blocks(width, sorted(starts)):
        standing = values[:, first : starts.get(first, last)].clone()
        if first > begin:
            until = first + standing.shape[1]
            standing.baddbmm_(unit[:, begin:first, first:until].transpose(1, 2), errors[:, begin:first])
        if find is not None and first in starts:
            group = int(groups[0, first])
            scales[:, group], zeros[:, group] = find(standing, group)
        columns = slice(first, last)
        block = Block(
            standing[:, : last - first],
            target[:, columns],
            unit[:, columns, columns],
            groups[:, columns],
            scales,
            zeros,
            centered[:, columns],
            errors[:, columns],
        )
        if can_compile(target.device):
            round_by_kernel(block, grid)
        else:
            round_block(block, grid)
        if begin + WIDE <= last < width:
            later = unit[:, begin:last, last:].transpose(1, 2)
            values[:, last:] += product(split(later), split(errors[:, begin:last]))
            begin = last
    return centered


class Block(NamedTuple):
    """Up to :data:`BLOCK` columns, which have made up for the errors before them; views of whole tensors.

    Attributes:
        values: [batch, columns, N], as they stand; changed.
        target, unit, groups, scales, zeros: As for :func:`round_columns`; ``unit`` [batch, columns, columns].
        centered, errors: [batch, columns, N], written.
    """

    values: torch.Tensor
    target: torch.Tensor
    unit: torch.Tensor
    groups: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    centered: torch.Tensor
    errors: torch.Tensor


def round_block(block: Block, grid: Grid) -> None:
    """Round a block's columns one by one."""
    values, target, unit, groups, scales, zeros, centered, errors = block
    each = torch.arange(len(values), device=values.device)
    for column in range(values.shape[1]):
        scale, zero = scales[each, groups[:, column]], zeros[each, groups[:, column]]
        code = grid.centered(values[:, column], scale, zero)
        centered[:, column] = code
        error = target[:, column] - code * scale  # and not `addcmul`, nor a matrix product: these fuse, or not
        errors[:, column] = error
        values[:, column + 1 :] += unit[:, column, column + 1 :, None] * error[:, None]


def round_by_kernel(block: Block, grid: Grid) -> None:
    """What :func:`round_block` does, to the same bits, in one launch of Triton's instead of eight for each column."""
    from graftq.quant_linear.kernels.columns import round_kernel  # not at the top, where triton may be absent

    batch, columns, outputs = block.values.shape
    with current(block.values.device):
        round_kernel[(-(-outputs // OUTPUTS), batch)](
            *block,
            *(columns, outputs, block.values.stride(0), block.target.stride(0), block.errors.stride(0)),
            *(*block.unit.stride(), block.groups.stride(0), block.scales.stride(0), grid.top, OUTPUTS, BLOCK),
            enable_fp_fusion=False,  # torch's products are rounded before they are added
        )


def _group_starts(groups: torch.Tensor) -> dict[int, int]:
    """First column of each group, and the column after its last."""
    places = [0, *(torch.nonzero(groups[1:] != groups[:-1])[:, 0] + 1).tolist(), len(groups)]
    return dict(pairwise(places))


def _blocks(width: int, starts: list[int]) -> list[tuple[int, int]]:
    """Ranges of at most ``BLOCK`` columns, none of which goes beyond a start."""
    ends = [*starts[1:], width]
    return [
        (first, min(first + BLOCK, end))
        for start, end in zip(starts or [0], ends, strict=True)
        for first in range(start, end, BLOCK)
    ]
