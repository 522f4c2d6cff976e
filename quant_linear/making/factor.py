"""Damping, and the one factorization that the column loop and the target need."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from graftq.quant_linear.making.products import Split, product, split

BLOCK = 512
"""Columns that :meth:`Factor.solve` solves for at once."""

GREATEST_DAMP = 1e3
"""Beyond this share of the mean diagonal a matrix that does not factor is not a matter of damping."""


@dataclass(frozen=True)
class Factor:
    """``A = H + damp * I`` and its factor, per layer of a batch, columns in the order in which they are rounded.

    Attributes:
        damped: float32 [batch, K, K], ``A`` in the order of the columns as given.
        parts: The same, for products.
        unit: float32 [batch, K, K], upper triangular with ones on the diagonal, in rounding order:
            ``A = unit D unit^T``. A column's error, times its row, is what later columns make up for.
        pivots: float32 [batch, K], the diagonal of ``D``.
        order: int64 [batch, K]; the column that is rounded at each place.
        damp: float32 [batch], what was added, as a share of the mean diagonal.
    """

    damped: torch.Tensor
    parts: Split
    unit: torch.Tensor
    pivots: torch.Tensor
    order: torch.Tensor
    damp: torch.Tensor

    def solve(self, right: torch.Tensor) -> torch.Tensor:
        """``A^-1 right`` for ``right`` [batch, K, N]."""
        index = self.order[:, :, None].expand_as(right)
        found = right.gather(1, index)
        _substitute(self.unit, found, upper=True)
        found /= self.pivots[:, :, None]
        _substitute(self.unit.transpose(1, 2), found, upper=False)
        return torch.empty_like(right).scatter_(1, index, found)


def _substitute(triangle: torch.Tensor, found: torch.Tensor, upper: bool) -> None:
    """Replace ``found`` [batch, K, N] by ``triangle^-1 found``, block by block; ``triangle`` is [batch, K, K]."""
    width = triangle.shape[1]
    starts = range(0, width, BLOCK)
    for first in reversed(starts) if upper else starts:
        own = slice(first, min(first + BLOCK, width))
        done = slice(own.stop, width) if upper else slice(0, first)
        block = found[:, own]
        if done.start < done.stop:
            block -= product(split(triangle[:, own, done]), split(found[:, done]))
        block.copy_(torch.linalg.solve_triangular(triangle[:, own, own], block, upper=upper))


def normalized(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gram matrices [batch, K, K] divided by their mean diagonal, and the divisors [batch, 1, 1].

    Where nothing came, or values so small that they underflow, the matrix is the identity and the divisor infinite.
    """
    mean = gram.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None]
    is_empty = mean <= 1e-20
    divisor = torch.where(is_empty, torch.full_like(mean, torch.inf), mean)
    identity = torch.eye(gram.shape[-1], device=gram.device)
    return torch.where(is_empty, identity, gram / divisor), divisor


def factorize(hessian: torch.Tensor, order: torch.Tensor, damp: float) -> Factor:
    """Damp and factor.

    Args:
        hessian: float32 [batch, K, K], of mean diagonal 1; becomes :attr:`Factor.damped`.
        order: As in :class:`Factor`.
        damp: The share of the mean diagonal to add; ten times as much, and again, where that does not suffice.

    Raises:
        ValueError: if no damping helps, because values are not finite.
    """
    shares = torch.full((len(hessian),), float(damp), device=hessian.device)
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    given = diagonal.clone()
    backward = order.flip(1)
    while True:
        diagonal.copy_(given + shares[:, None])
        lower, failed = torch.linalg.cholesky_ex(permuted(hessian, backward))
        bad = (failed > 0) | ~torch.isfinite(lower.diagonal(dim1=1, dim2=2)).all(-1)  # where all of a row adds up
        if not bool(bad.any()):
            break
        shares = torch.where(bad, (shares * 10).clamp(min=1e-6), shares)
        if float(shares.max()) > GREATEST_DAMP:
            raise ValueError("the Hessian cannot be factored, however much it is damped")
    unit = lower.flip(1, 2)
    del lower
    roots = unit.diagonal(dim1=1, dim2=2).clone()
    unit /= roots[:, None]
    return Factor(hessian, split(hessian), unit, roots.square(), order, shares)


def permuted(matrix: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Rows and columns of [batch, K, K] in another order."""
    rows = matrix.gather(1, order[:, :, None].expand_as(matrix))
    return rows.gather(2, order[:, None].expand_as(matrix))
