"""Better scales for given codes, and better codes for given scales; neither ever raises the objective."""

from __future__ import annotations

import torch

from graftq.quant_linear.making.grid import Grid
from graftq.quant_linear.making.products import Split, product, split

LARGEST_SYSTEM = 2**25
"""Numbers in the normal equations that are solved at once."""


def objective(hessian: Split, error: torch.Tensor) -> torch.Tensor:
    """``diag(E^T H E)``: the squared error of each output, [batch, N], for errors [batch, K, N]."""
    return product(hessian, split(error)).mul_(error).sum(1)


def refit(centered: torch.Tensor, target: torch.Tensor, hessian: Split, group_size: int) -> torch.Tensor:
    """The scales that minimize the objective while the codes stay.

    Source: the normal equations of ``target ~ codes * scales`` per output; the idea is arXiv 2602.02126's.

    Args:
        centered: float32 [batch, K, N], ``code - zero``, groups side by side.
        target: float32 [batch, K, N].
        hessian: Of [batch, K, K], positive definite.
        group_size: Columns per group; the last may have fewer.

    Returns:
        float32 [batch, groups, N], not rounded; of no meaning for a group whose codes are all zero.
    """
    batch, width, outputs = centered.shape
    groups = -(-width // group_size)
    scales = torch.empty(batch, groups, outputs, device=centered.device)
    step = max(1, LARGEST_SYSTEM // (batch * groups * groups))
    for first in range(0, outputs, step):
        rows = slice(first, first + step)
        codes = centered[:, :, rows]
        right = _sum_groups(product(hessian, split(target[:, :, rows])).mul_(codes), group_size)
        system = torch.empty(batch, codes.shape[2], groups, groups, device=codes.device)
        for group in range(groups):
            first_column = group * group_size
            own = slice(first_column, first_column + group_size)
            below = hessian[:, first_column:, own]
            seen = product(below, split(codes[:, own], is_exact=True)).mul_(codes[:, first_column:])
            sums = _sum_groups(seen, group_size).transpose(1, 2)
            system[:, :, group, group:] = sums
            system[:, :, group:, group] = sums
        diagonal = system.diagonal(dim1=2, dim2=3)
        diagonal += diagonal.mean(-1, keepdim=True) * 1e-6 + (diagonal <= 1e-12)
        solved = torch.linalg.solve_ex(system, right.permute(0, 2, 1)[..., None])[0]
        scales[:, :, rows] = solved[..., 0].permute(0, 2, 1)
    return scales


def descend(
    centered: torch.Tensor,
    target: torch.Tensor,
    hessian: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    grid: Grid,
) -> torch.Tensor:
    """One pass of coordinate descent over the codes.

    Args:
        centered, target: As for :func:`refit`.
        hessian: float32 [batch, K, K], positive definite.
        scales, zeros: float32 [batch, K, N], of each column.
        grid: The codes.

    Returns:
        Centered codes whose objective is at most that of ``centered``.
    """
    centered = centered.clone()
    slope = torch.bmm(hessian, target - centered * scales)
    curvature = hessian.diagonal(dim1=1, dim2=2)
    for column in range(centered.shape[1]):
        scale, old = scales[:, column], centered[:, column].clone()
        wanted = old * scale + slope[:, column] / curvature[:, column, None]
        new = grid.centered(wanted, scale, zeros[:, column])
        centered[:, column] = new
        slope.baddbmm_(hessian[:, :, column, None], ((old - new) * scale)[:, None])
    return centered


def _sum_groups(values: torch.Tensor, group_size: int) -> torch.Tensor:
    """Sums over each group's columns: [batch, K, N] to [batch, groups, N]."""
    batch, width, outputs = values.shape
    missing = -width % group_size
    if missing:
        values = torch.nn.functional.pad(values, (0, 0, 0, missing))
    return values.view(batch, -1, group_size, outputs).sum(2)
