"""The column loop: round one column, let those not yet rounded make up for its error, go on."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch

from graftq.quant_linear.making.grid import Grid

BLOCK = 128
"""Columns between two matrix products."""

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

    Source: Frantar et al., GPTQ (2022), in the left-looking form: the error of the columns before comes by one product
    per block, and no inverse is taken.

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
    batch, width, _ = target.shape
    centered = torch.empty_like(target)
    errors = torch.empty_like(target)
    each = torch.arange(batch, device=target.device)
    starts = _group_starts(groups[0]) if find is not None else {}
    for first, last in _blocks(width, sorted(starts)):
        ahead = last
        if find is not None and first in starts:
            ahead = max(last, starts[first])
        whole = target[:, first:ahead].clone()
        if first:
            whole.baddbmm_(unit[:, :first, first:ahead].transpose(1, 2), errors[:, :first])
        block = whole[:, : last - first]
        for column in range(first, last):
            place = column - first
            if find is not None and column in starts:
                group = int(groups[0, column])
                scales[:, group], zeros[:, group] = find(whole[:, place : starts[column] - first], group)
            scale, zero = scales[each, groups[:, column]], zeros[each, groups[:, column]]
            code = grid.centered(block[:, place], scale, zero)
            centered[:, column] = code
            error = torch.addcmul(target[:, column], code, scale, value=-1)
            errors[:, column] = error
            if column + 1 < last:
                row = unit[:, column, column + 1 : last]
                block[:, place + 1 :].baddbmm_(row[:, :, None], error[:, None])
    return centered


def _group_starts(groups: torch.Tensor) -> dict[int, int]:
    """First column of each group, and the column after its last."""
    places = [0, *(torch.nonzero(groups[1:] != groups[:-1])[:, 0] + 1).tolist(), len(groups)]
    return dict(pairwise(places))


def _blocks(width: int, starts: list[int]) -> list[tuple[int, int]]:
    """Ranges of at most ``BLOCK`` columns; a group either lies in one, or starts one."""
    if not starts:
        return [(first, min(first + BLOCK, width)) for first in range(0, width, BLOCK)]
    ranges: list[tuple[int, int]] = []
    for start, end in zip(starts, [*starts[1:], width], strict=True):
        if ranges and ranges[-1][1] == start and end - ranges[-1][0] <= BLOCK:
            ranges[-1] = (ranges[-1][0], end)
        else:
            ranges += [(first, min(first + BLOCK, end)) for first in range(start, end, BLOCK)]
    return ranges
