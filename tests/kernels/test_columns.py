"""The kernel of GPTQ's column loop gives the very codes and errors that torch gives."""

from __future__ import annotations

import pytest
import torch

from graftq.quant_linear.making.columns import Block, round_block, round_by_kernel
from graftq.quant_linear.making.grid import Grid


def block(batch: int, columns: int, outputs: int, grid: Grid, device: str) -> Block:
    groups = torch.randint(0, 3, (batch, columns), device=device)
    values, target = torch.randn(2, batch, columns + 5, outputs, device=device)
    unit = (torch.randn(batch, 2 * columns, columns, device=device) * 0.1).mT  # as cholesky returns it: columns first
    scales = torch.rand(batch, 3, outputs, device=device) * 0.1 + 0.05
    zeros = torch.full_like(scales, grid.middle)
    if grid.sym:
        scales[:, 1] *= -1
    else:
        zeros = torch.randint(1, grid.top + 1, scales.shape, device=device).float()
    empty = torch.zeros(2, batch, columns + 5, outputs, device=device)
    here = slice(5, None)
    return Block(values[:, here], target[:, here], unit[..., here.start : 5 + columns], groups, scales, zeros,
                 empty[0, :, here], empty[1, :, here])  # fmt: skip


@pytest.mark.parametrize("grid", [Grid(2, True), Grid(3, False), Grid(4, True), Grid(8, False)], ids=str)
@pytest.mark.parametrize(("batch", "columns", "outputs"), [(1, 64, 32), (2, 24, 72), (2, 1, 5)])
def test_to_the_bit(grid: Grid, batch: int, columns: int, outputs: int, device: str) -> None:
    first = block(batch, columns, outputs, grid, device)
    second = Block(*(tensor.clone(memory_format=torch.preserve_format) for tensor in first))
    round_block(first, grid)
    round_by_kernel(second, grid)
    assert torch.equal(first.centered, second.centered)
    assert torch.equal(first.errors, second.errors)
    assert first.centered.any()
