"""The kernel that searches for scales chooses what torch chooses, but for candidates that are as good."""

from __future__ import annotations

import pytest
import torch

from graftq.quant_linear.making.grid import Grid


def weighted_error(grid: Grid, weight: torch.Tensor, importance: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor):
    off = grid.centered(weight, scale[:, None], zero[:, None]) * scale[:, None] - weight
    return (off.double().square() * importance[:, :, None]).sum(1)


@pytest.mark.parametrize(
    ("grid", "batch", "columns", "outputs"),
    [(Grid(2, True), 1, 150, 5), (Grid(3, False), 1, 24, 5), (Grid(4, True), 2, 24, 5), (Grid(8, False), 1, 32, 40)],
    ids=str,
)
def test_the_same_scales(grid: Grid, batch: int, columns: int, outputs: int, device: str) -> None:
    stored = torch.randn(batch, columns + 3, outputs, device=device) + 0.1
    weight, importance = stored[:, 3:], torch.rand(batch, columns + 3, device=device)[:, 3:]
    weight[:, :, 1] = weight[:, :, 1].abs()
    weight[:, :, 2] = 0
    kernel, torch_s = grid.search_by_kernel(weight, importance), grid.search_by_torch(weight, importance)
    assert (kernel[0] == torch_s[0]).float().mean() > 0.95
    found, wanted = (weighted_error(grid, weight, importance, *pair) for pair in (kernel, torch_s))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-9)
    assert (found <= weighted_error(grid, weight, importance, *grid.plain(weight)) * (1 + 1e-6)).all()
