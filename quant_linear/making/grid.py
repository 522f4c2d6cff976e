"""The numbers a code can stand for, and the search for the scales that fit weights best."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from graftq.quant_linear.gpu.availability import can_compile
from graftq.quant_linear.gpu.devices import current

SMALLEST = 2.0**-14
"""The least magnitude of a scale: below, float16 loses bits."""

LARGEST = 65504.0
"""The greatest magnitude of a scale in float16."""

STEPS = 48
"""Scales tried per group and sign."""

OUTPUTS = 32
"""Outputs of one program of the kernel."""

COLUMNS = 128
"""Columns that it holds at once."""


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
        if can_compile(weight.device):
            return self.search_by_kernel(weight, importance)
        return self.search_by_torch(weight, importance)

    def search_by_torch(self, weight: torch.Tensor, importance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """:meth:`search`, one candidate at a time."""
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

    def search_by_kernel(self, weight: torch.Tensor, importance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """:meth:`search` with the same candidates, in one launch of Triton's; errors are summed in another order."""
        from graftq.quant_linear.kernels.scales import search_kernel  # not at the top, where triton may be absent

        batch, columns, outputs = weight.shape
        scales, zeros = self.plain(weight)
        low = weight.amin(1).clamp(max=0)
        factors = torch.tensor(self._factors(), dtype=torch.float32, device=weight.device)
        with current(weight.device):
            search_kernel[(batch, -(-outputs // OUTPUTS))](
                *(weight, importance, low, factors, scales, zeros),
                *(columns, outputs, weight.stride(0), importance.stride(0)),
                *(SMALLEST, LARGEST, STEPS, self.sym, self.middle, self._roundings, self.top, OUTPUTS),
                min(COLUMNS, 1 << (columns - 1).bit_length()),
                enable_fp_fusion=False,  # torch's products are rounded before they are added
            )
        return scales, zeros

    def _factors(self) -> list[float]:
        """Of the scale that covers a group's range, those that are tried."""
        widest = 1.2 if self.sym else 1.0
        return [widest - (widest - 0.25) * step / (STEPS - 1) for step in range(STEPS)]

    @property
    def _roundings(self) -> int:
        """Candidates of each factor; of an asymmetric grid of few levels it matters which of them is zero."""
        return 2 if self.sym else 3 if self.bits <= 3 else 1

    def _candidates(self, weight: torch.Tensor, plain: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        low = weight.amin(1).clamp(max=0)
        middle = torch.full_like(plain, self.middle)
        for factor in self._factors():
            scale = _storable(plain * factor)
            if self.sym:
                yield scale, middle
                yield -scale, middle
                continue
            exact = low * (-factor) / scale
            yield scale, exact.round().clamp_(1, self.top)
            if self._roundings > 1:
                yield scale, exact.floor().clamp_(1, self.top)
                yield scale, exact.ceil().clamp_(1, self.top)


def storable(scale: torch.Tensor, instead: torch.Tensor) -> torch.Tensor:
    """Scales of any sign as float16 keeps them, ``instead`` where they are zero, not finite or out of its range."""
    rounded = scale.to(torch.float16).to(torch.float32)
    size = rounded.abs()
    return torch.where((size >= SMALLEST) & (size <= LARGEST), rounded, instead)


def _storable(scale: torch.Tensor) -> torch.Tensor:
    return scale.clamp(SMALLEST, LARGEST).to(torch.float16).to(torch.float32)
