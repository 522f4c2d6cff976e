"""Damping, and the one factorization that the column loop and the target need."""

from __future__ import annotations

from dataclasses import dataclass

import torch

GREATEST_DAMP = 1e3
"""Beyond this share of the mean diagonal a matrix that does not factor is not a matter of damping."""


@dataclass(frozen=True)
class Factor:
    """``A = H + damp * I`` and its factor, per layer of a batch, columns in the order in which they are rounded.

    Attributes:
        damped: float32 [batch, K, K], ``A`` in the order of the columns as given.
        unit: float32 [batch, K, K], upper triangular with ones on the diagonal, in rounding order:
            ``A = unit D unit^T``. A column's error, times its row, is what later columns make up for.
        order: int64 [batch, K]; the column that is rounded at each place.
        damp: float32 [batch], what was added, as a share of the mean diagonal.
        lower: The Cholesky factor of ``A`` in reversed order, for :meth:`solve`.
    """

    damped: torch.Tensor
    unit: torch.Tensor
    order: torch.Tensor
    damp: torch.Tensor
    lower: torch.Tensor

    def solve(self, right: torch.Tensor) -> torch.Tensor:
        """``A^-1 right`` for ``right`` [batch, K, N]."""
        backward = self.order.flip(1)
        index = backward[:, :, None].expand_as(right)
        found = torch.cholesky_solve(right.gather(1, index), self.lower)
        return torch.empty_like(right).scatter_(1, index, found)


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
        hessian: float32 [batch, K, K], of mean diagonal 1.
        order: As in :class:`Factor`.
        damp: The share of the mean diagonal to add; ten times as much, and again, where that does not suffice.

    Raises:
        ValueError: if no damping helps, because values are not finite.
    """
    batch, width, _ = hessian.shape
    shares = torch.full((batch,), float(damp), device=hessian.device)
    identity = torch.eye(width, device=hessian.device)
    backward = order.flip(1)
    while True:
        damped = hessian + identity * shares[:, None, None]
        lower, failed = torch.linalg.cholesky_ex(_permuted(damped, backward))
        bad = (failed > 0) | ~torch.isfinite(lower).all(-1).all(-1)
        if not bool(bad.any()):
            break
        shares = torch.where(bad, (shares * 10).clamp(min=1e-6), shares)
        if float(shares.max()) > GREATEST_DAMP:
            raise ValueError("the Hessian cannot be factored, however much it is damped")
    upper = lower.flip(1, 2)
    unit = upper / upper.diagonal(dim1=1, dim2=2)[:, None]
    return Factor(damped, unit, order, shares, lower)


def _permuted(matrix: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Rows and columns of [batch, K, K] in another order."""
    rows = matrix.gather(1, order[:, :, None].expand_as(matrix))
    return rows.gather(2, order[:, None].expand_as(matrix))
