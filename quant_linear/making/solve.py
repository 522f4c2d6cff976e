"""From float weights and moments to codes and scales."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from graftq.quant_linear.gpu.availability import can_compile
from graftq.quant_linear.making.columns import Find, round_columns
from graftq.quant_linear.making.factor import Factor, factorize, normalized, permuted
from graftq.quant_linear.making.grid import Grid, storable
from graftq.quant_linear.making.improve import descend, objective, refit
from graftq.quant_linear.making.moments import Moments
from graftq.quant_linear.making.products import product, split
from graftq.quant_linear.packing import weights_of
from graftq.quant_linear.spec import SUPPORTED_BITS

ORDERS = ("static", "grouped", "stored")
"""Orders in which columns are rounded, see :class:`Method`."""


@dataclass(frozen=True)
class Method:
    """How to quantize.

    Attributes:
        bits: 2, 3, 4 or 8.
        group_size: Columns that share a scale, -1 for all.
        sym: Whether zero points are fixed at ``2**(bits-1)``.
        order: ``static`` rounds columns by falling curvature and leaves groups where they are: nothing to pay at
            inference. ``grouped`` also makes groups in that order (AutoGPTQ's ``desc_act``). ``stored`` takes the
            columns as they are.
        damp: Share of the Hessian's mean diagonal that is added to it.
        search: Whether scales are searched for; otherwise they cover the range of the weights.
        drift: How much of the error that came before a layer it makes up for, 0 to 1.
        refits: How often scales are refitted to codes.
        passes: Passes of coordinate descent over the codes.
    """

    bits: int
    group_size: int = 128
    sym: bool = True
    order: str = "static"
    damp: float = 0.1
    search: bool = True
    drift: float = 0.5
    refits: int = 1
    passes: int = 0

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: naming the first that cannot be.
        """
        if self.bits not in SUPPORTED_BITS:
            raise ValueError(f"bits={self.bits!r}: GPTQ has {', '.join(map(str, SUPPORTED_BITS))}")
        if self.group_size != -1 and self.group_size < 1:
            raise ValueError(f"group_size={self.group_size!r}: -1 (one group) or a positive number")
        if self.order not in ORDERS:
            raise ValueError(f"order={self.order!r}: one of {', '.join(ORDERS)}")
        if not 0 < self.damp < 1:
            raise ValueError(f"damp={self.damp!r}: above 0 and below 1")
        if not 0 <= self.drift <= 1:
            raise ValueError(f"drift={self.drift!r}: from 0 to 1")

    @property
    def grid(self) -> Grid:
        """The codes."""
        return Grid(self.bits, self.sym)


@dataclass(frozen=True)
class Solution:
    """Quantized layers of one shape, and how well that went.

    Attributes:
        method: How they were made.
        codes: uint8 [batch, K, N].
        scales: float16 [batch, groups, N]; negative ones occur in symmetric layers.
        zeros: uint8 [batch, groups, N].
        g_idx: int32 [batch, K].
        error: float32 [batch], ``tr(E A E^T)`` of what was made against the target.
        nearest: float32 [batch], that of rounding to the nearest code.
        damp: float32 [batch], the damping that was used.
        clipped: float32 [batch], the share of weights outside of their grid's range.
    """

    method: Method
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    g_idx: torch.Tensor
    error: torch.Tensor
    nearest: torch.Tensor
    damp: torch.Tensor
    clipped: torch.Tensor

    def weight(self, index: int = 0) -> torch.Tensor:
        """What a layer has become, float32 [N, K]."""
        zeros, group = self.zeros[index].to(torch.int32), self.g_idx[index].long()
        return weights_of(self.codes[index], zeros, self.scales[index], group).T


@torch.no_grad()
def solve(weight: torch.Tensor, moments: Moments, method: Method) -> Solution:
    """Quantize layers of one shape.

    Minimizes ``tr((W* - Q) A (W* - Q)^T)`` over the quantized ``Q``, where ``A`` is the damped mean of ``x x^T`` and
    ``W* = W + drift * W C A^-1`` aims at the float model's outputs from the quantized model's inputs (the objective of
    arXiv 2504.02692, in closed form; ``C`` is the mean of ``(x_float - x) x^T``). Per output, the result is the best of
    what was tried, rounding to nearest included.

    Args:
        weight: Any float dtype [batch, N, K]. Layers that share inputs go side by side along N: they then share
            ``g_idx``.
        moments: Of their inputs.
        method: How.

    Raises:
        ValueError: if a weight or a moment is NaN or infinite.
    """
    weight = weight.to(torch.float32)
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("the weight holds NaN or infinite values")
    moments.check()
    batch, _, width = weight.shape
    hessian, divisor = normalized(moments.gram)
    by_curvature = hessian.diagonal(dim1=1, dim2=2).argsort(dim=-1, descending=True, stable=True)
    stored = torch.arange(width, device=weight.device).expand(batch, width)
    place = by_curvature if method.order == "grouped" else stored  # where groups are made: they lie side by side here
    if method.order == "grouped":
        hessian = permuted(hessian, place)
    plain = weight.transpose(1, 2).contiguous()
    del weight
    index = place[:, :, None].expand_as(plain)
    pulled = None
    if moments.drift is not None and method.drift:  # before there is a factor, whose matrices are as large
        pulled = product(split((moments.drift / divisor).transpose(1, 2)), split(plain)).gather(1, index)
    target = plain.gather(1, index)
    del plain
    factor = factorize(hessian, by_curvature if method.order == "static" else stored, method.damp)
    if pulled is not None:
        target += method.drift * factor.solve(pulled)
        del pulled
    search = _Search(target, factor, method)
    search.run()
    group = (stored // search.group_size).to(torch.int32)
    back = place.argsort(-1)
    codes = (search.centered + search.per_column(search.zeros)).to(torch.uint8)
    reach = torch.round(target / search.per_column(search.scales)) + search.per_column(search.zeros)
    return Solution(
        method=method,
        codes=codes.gather(1, back[:, :, None].expand_as(codes)),
        scales=search.scales.to(torch.float16),
        zeros=search.zeros.to(torch.uint8),
        g_idx=group.gather(1, back),
        error=search.best.sum(-1),
        nearest=search.nearest.sum(-1),
        damp=factor.damp,
        clipped=((reach < 0) | (reach > method.grid.top)).float().mean((1, 2)),
    )


class _Search:
    """The best codes and scales so far, per output; columns lie where groups are side by side."""

    def __init__(self, target: torch.Tensor, factor: Factor, method: Method):
        batch, width, outputs = target.shape
        self.target, self.factor, self.method, self.grid = target, factor, method, method.grid
        self.group_size = width if method.group_size == -1 else min(method.group_size, width)
        self.groups = -(-width // self.group_size)
        self.of_column = torch.arange(width, device=target.device) // self.group_size
        self.importance = factor.damped.diagonal(dim1=1, dim2=2)
        shape = (batch, self.groups, outputs)
        self.scales, self.zeros = target.new_empty(shape), target.new_empty(shape)
        self.centered = torch.zeros_like(target)
        self.best = target.new_full((batch, outputs), torch.inf)
        self.nearest = self.best

    def run(self) -> None:
        """Try everything that the method says."""
        plain = self._scales(lambda weight, group: self.grid.plain(weight))
        rounded = self._nearest(*plain)
        self._keep(rounded, *plain)
        self.nearest = self.best
        if self.method.order == "grouped":
            scales, zeros = torch.empty_like(self.scales), torch.empty_like(self.zeros)
            self._keep(self._loop(scales, zeros, self._find), scales, zeros)
        else:
            scales, zeros = self._found() if self.method.search else plain
            self._keep(self._loop(scales, zeros), scales, zeros)
        self._keep(self._nearest(scales, zeros), scales, zeros)
        if bool(
            ((self.best == self.nearest) & (self.best > 0)).any()
        ):  # rounding was better somewhere: then its scales may be, too
            self._keep(self._loop(*plain), *plain)
        for _ in range(self.method.refits):
            self._refit()
            self._keep(self._loop(self.scales, self.zeros), self.scales, self.zeros)
        for _ in range(self.method.passes):
            scales, zeros = self.per_column(self.scales), self.per_column(self.zeros)
            codes = descend(self.centered, self.target, self.factor.damped, scales, zeros, self.grid)
            self._keep(codes, self.scales, self.zeros)
            self._refit()

    def per_column(self, values: torch.Tensor) -> torch.Tensor:
        """Values of groups [batch, groups, N] for every column [batch, K, N]."""
        return values[:, self.of_column]

    def _find(self, weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.method.search:
            return self.grid.plain(weight)
        first = group * self.group_size
        return self.grid.search(weight, self.importance[:, first : first + self.group_size])

    def _found(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales and zeros of all groups: at once on a GPU, one after the other where caches matter."""
        if not can_compile(self.target.device) or self.groups * self.group_size != self.target.shape[1]:
            return self._scales(self._find)
        weight = self.target.reshape(-1, self.group_size, self.target.shape[2])
        scales, zeros = self.grid.search(weight, self.importance.reshape(-1, self.group_size))
        return scales.view(self.scales.shape), zeros.view(self.zeros.shape)

    def _scales(self, find: Find) -> tuple[torch.Tensor, torch.Tensor]:
        found = [
            find(self.target[:, group * self.group_size : (group + 1) * self.group_size], group)
            for group in range(self.groups)
        ]
        return torch.stack([scale for scale, _ in found], 1), torch.stack([zero for _, zero in found], 1)

    def _nearest(self, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
        return self.grid.centered(self.target, self.per_column(scales), self.per_column(zeros))

    def _loop(self, scales: torch.Tensor, zeros: torch.Tensor, find: Find | None = None) -> torch.Tensor:
        order = self.factor.order
        index = order[:, :, None].expand_as(self.target)
        target = self.target.gather(1, index)
        codes = round_columns(target, self.factor.unit, self.of_column[order], scales, zeros, self.grid, find)
        return torch.empty_like(codes).scatter_(1, index, codes)

    def _refit(self) -> None:
        scales = refit(self.centered, self.target, self.factor.parts, self.group_size)
        if not self.grid.sym:
            scales = torch.where(scales > 0, scales, self.scales)
        self._keep(self.centered, storable(scales, self.scales), self.zeros)

    def _keep(self, centered: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> None:
        """Take a candidate for the outputs where it is better."""
        error = torch.addcmul(self.target, centered, self.per_column(scales), value=-1)
        found = objective(self.factor.parts, error)
        better = found < self.best
        self.best = torch.where(better, found, self.best)
        self.centered = torch.where(better[:, None], centered, self.centered)
        self.scales = torch.where(better[:, None], scales, self.scales)
        self.zeros = torch.where(better[:, None], zeros, self.zeros)
