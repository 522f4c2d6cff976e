"""The numbers a code can stand for, and the search for the scales that fit weights best."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

SMALLEST = 2.0**-14
"""The least magnitude of a scale: below, float16 loses bits."""

LARGEST = 65504.0
"""The greatest magnitude of a scale in float16."""

STEPS = 48
"""Scales tried per group and sign."""


@dataclass(frozen=True)
class Grid:
    """``value = (code - zero) * scale`` with codes of ``bits`` bits.

    A symmetric grid has ``zero = 2**(bits-1)`` and reaches one step further below zero than above it, so that the sign
    of the scale says on which side the longer half lies. An asymmetric one has any ``zero`` from 1 on: the format
    ``gptq`` stores it minus one.

    Attributes:
        bits: Code width.
        sym: Whether zero is fixed.
    """

    bits: int
    sym: bool

    @property
    def top(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    @property
    def middle(self) -> int:
        """The zero point of the symmetric grid."""
        return 2 ** (self.bits - 1)

    def centered(self, weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """The nearest ``code - zero``, in float."""
        return (torch.round(weight / scale) + zero).clamp_(0, self.top).sub_(zero)

    def plain(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales and zeros, float32 [batch, N], that cover the range of ``weight`` [batch, columns, N]."""
        if self.sym:
            scale = _storable(weight.abs().amax(1) * (2 / self.top))
            return scale, torch.full_like(scale, self.middle)
        low, high = weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)
        scale = _storable((high - low) / self.top)
        return scale, torch.round(-low / scale).clamp_(1, self.top)

    def search(self, weight: torch.Tensor, importance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales and zeros of one group that round best, column by column weighted.

        Args:
            weight: float32 [batch, columns, N].
            importance: float32 [batch, columns], the curvature of each column.

        Returns:
            Scales (float16 values in float32, of either sign if the grid is symmetric) and zeros, [batch, N]. The
            weighted error is never above that of :meth:`plain`.
        """
        best_scale, best_zero = self.plain(weight)

        def error(scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
            scale, zero = scale[:, None], zero[:, None]
            off = self.centered(weight, scale, zero).mul_(scale).sub_(weight)
            return torch.bmm(importance[:, None], off.square_())[:, 0]

        least = error(best_scale, best_zero)
        for scale, zero in self._candidates(weight, best_scale):
            found = error(scale, zero)
            better = found < least
            least = torch.where(better, found, least)
            best_scale = torch.where(better, scale, best_scale)
            best_zero = torch.where(better, zero, best_zero)
        return best_scale, best_zero

    def _candidates(self, weight: torch.Tensor, plain: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        widest = 1.2 if self.sym else 1.0
        low = weight.amin(1).clamp(max=0)
        middle = torch.full_like(plain, self.middle)
        for step in range(STEPS):
            factor = widest - (widest - 0.25) * step / (STEPS - 1)
            scale = _storable(plain * factor)
            if self.sym:
                yield scale, middle
                yield -scale, middle
                continue
            exact = low * (-factor) / scale
            yield scale, exact.round().clamp_(1, self.top)
            if self.bits <= 3:  # few levels: which of them is zero matters
                yield scale, exact.floor().clamp_(1, self.top)
                yield scale, exact.ceil().clamp_(1, self.top)


def storable(scale: torch.Tensor, instead: torch.Tensor) -> torch.Tensor:
    """Scales of any sign as float16 keeps them, ``instead`` where they are zero, not finite or out of its range."""
    rounded = scale.to(torch.float16).to(torch.float32)
    size = rounded.abs()
    return torch.where((size >= SMALLEST) & (size <= LARGEST), rounded, instead)


def _storable(scale: torch.Tensor) -> torch.Tensor:
    return scale.clamp(SMALLEST, LARGEST).to(torch.float16).to(torch.float32)
