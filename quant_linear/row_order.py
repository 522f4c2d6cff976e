"""In which order a layout keeps the input rows of a projection, and which projections share that order.

Act-order gives neighboring input rows different groups. Every layout here sorts the rows by group once, at load, so
that a run of rows (a *unit*) shares one scale per output; the activations are gathered in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from graftq.quant_linear.packing import sequential_g_idx
from graftq.quant_linear.spec import QuantSpec

NO_ROW = 2**31 - 1
"""Entry of :attr:`RowOrder.order` for padding: beyond any input, so that a bounds check skips it."""


@dataclass(frozen=True)
class RowOrder:
    """Where each stored input row goes.

    Attributes:
        order: int32 [rows], the stored row at each place (:data:`NO_ROW` for padding), or None if no row moves.
        unit_group: int64 [rows / unit], ascending, the group of each unit.
        unit: Rows that share a scale.
    """

    order: torch.Tensor | None
    unit_group: torch.Tensor
    unit: int

    @property
    def rows(self) -> int:
        """Number of places."""
        return len(self.unit_group) * self.unit

    def padded(self, rows: int) -> RowOrder:
        """The same with padding up to ``rows`` places, a multiple of :attr:`unit`."""
        if rows == self.rows:
            return self
        order = self.order
        if order is not None:
            order = torch.nn.functional.pad(order, (0, rows - self.rows), value=NO_ROW)
        padding = self.unit_group[-1:].expand((rows - self.rows) // self.unit)
        return RowOrder(order, torch.cat([self.unit_group, padding]), self.unit)

    def first_units(self, num_groups: int) -> torch.Tensor:
        """The first unit of each group: int64 [num_groups]."""
        return torch.searchsorted(self.unit_group, torch.arange(num_groups, device=self.unit_group.device))


def stored_rows(spec: QuantSpec) -> int:
    """Codes in a column of ``qweight`` once it is padded to whole blocks of 32 codes."""
    return -(-spec.packed_rows // spec.bits) * 32


def order_rows(
    spec: QuantSpec, g_idx: torch.Tensor | None, unit: int, device: torch.device, multiple: int | None = None
) -> RowOrder:
    """Sort the input rows by group (stable), and pad each group to whole units; an empty group gets one.

    Args:
        spec: The projection.
        g_idx: As stored; must be there if the spec says act-order.
        unit: Rows that are to share a scale.
        device: Where to make the tensors.
        multiple: What the number of places is to be a multiple of: ``unit``, or a multiple of that.

    Raises:
        ValueError: if ``g_idx`` is missing.
    """
    return order_alike([spec], [g_idx], unit, device, multiple)[0]


def order_alike(
    specs: Sequence[QuantSpec],
    g_idx: Sequence[torch.Tensor | None],
    unit: int,
    device: torch.device,
    multiple: int | None = None,
) -> list[RowOrder]:
    """:func:`order_rows` of projections of one size, which may differ in their act-order; padded to the longest.

    All that are sorted are sorted at once, and a GPU is waited for once: the experts of a layer are many.
    """
    multiple = multiple or unit
    found: dict[int, RowOrder] = {}
    groups: dict[int, torch.Tensor] = {}
    for number, (spec, each) in enumerate(zip(specs, g_idx, strict=True)):
        if spec.num_groups == 1 or (not spec.desc_act and spec.group_size % unit == 0):
            rows = -(-stored_rows(spec) // multiple) * multiple
            group = torch.arange(0, rows, unit, device=device) // spec.group_size
            found[number] = RowOrder(None, group.clamp(max=spec.num_groups - 1), unit)
        else:
            groups[number] = _groups(spec, each, device)
    for length in {len(group) for group in groups.values()}:  # some may be stored without the padding that others have
        numbers = [number for number, group in groups.items() if len(group) == length]
        stacked = torch.stack([groups[number] for number in numbers])
        found.update(zip(numbers, _sorted(specs[numbers[0]], stacked, unit, multiple), strict=True))
    longest = max(order.rows for order in found.values())
    return [found[number].padded(longest) for number in range(len(specs))]


def _sorted(spec: QuantSpec, group: torch.Tensor, unit: int, multiple: int) -> list[RowOrder]:
    """The row orders of projections that differ only in the groups of their rows: int64 [projections, rows]."""
    stored, (projections, own), device = stored_rows(spec), group.shape, group.device
    by_group = torch.argsort(group, stable=True)
    sorted_group = group.gather(1, by_group)
    counts = torch.zeros(projections, spec.num_groups, dtype=torch.int64, device=device)
    counts.scatter_add_(1, group, torch.ones_like(group))
    units = (counts + unit - 1).div(unit, rounding_mode="floor").clamp(min=1)
    last_unit = units.cumsum(1)
    # From a row's number in the sorted order to its place.
    shift = (last_unit - units) * unit - (counts.cumsum(1) - counts)
    place = torch.arange(own, device=device) + shift.gather(1, sorted_group)
    rows = -(-max(int(last_unit.max()) * unit, stored) // multiple) * multiple
    order = torch.full((projections, rows), NO_ROW, dtype=torch.int32, device=device)
    order.scatter_(1, place, by_group.to(torch.int32))
    if own < stored:  # codes that fill up the last words, and have no group
        # They go where groups leave places free: a unit of their own would belong to a group that does not exist.
        is_free = order == NO_ROW
        row = is_free.cumsum(1) + (own - 1)
        order = torch.where(is_free & (row < stored), row, order).to(torch.int32)
    unit_number = torch.arange(rows // unit, device=device).expand(projections, -1)
    unit_group = torch.searchsorted(last_unit, unit_number.contiguous(), right=True).clamp(max=spec.num_groups - 1)
    return [RowOrder(*each, unit) for each in zip(order, unit_group, strict=True)]


def common_unit(spec: QuantSpec, g_idx: torch.Tensor | None, units: Sequence[int]) -> int:
    """The first of ``units`` (descending) that divides the length of every group; the last if none does."""
    if spec.num_groups == 1:
        lengths = {stored_rows(spec)}
    elif not spec.desc_act:
        lengths = {spec.group_size}
    else:
        counts = torch.bincount(_groups(spec, g_idx, None), minlength=spec.num_groups)
        lengths = set(counts.tolist())
    return next((unit for unit in units if not any(length % unit for length in lengths)), units[-1])


def has_even_groups(spec: QuantSpec, g_idx: torch.Tensor | None) -> bool:
    """Whether every group but the last has ``group_size`` rows, and the last has no more."""
    if not spec.desc_act:
        return True
    counts = torch.bincount(_groups(spec, g_idx, None), minlength=spec.num_groups)
    return bool((counts[:-1] == spec.group_size).all()) and int(counts[-1]) <= spec.group_size


def can_multiply_as_one(
    spec: QuantSpec, g_idx: torch.Tensor | None, other: QuantSpec, other_g_idx: torch.Tensor | None
) -> bool:
    """Whether one product can serve two projections of the same input: they may differ in nothing but their outputs.

    That is, in values, biases, symmetry and the number of outputs. What a kernel or layout wants besides is its own.
    """
    same = ("bits", "in_features", "group_size", "num_groups", "desc_act", "zero_offset", "padded_in")
    if any(getattr(spec, name) != getattr(other, name) for name in same):
        return False
    if not spec.desc_act:
        return True
    return g_idx is not None and other_g_idx is not None and torch.equal(g_idx, other_g_idx)


def _groups(spec: QuantSpec, g_idx: torch.Tensor | None, device: torch.device | None) -> torch.Tensor:
    """The group of each input row: int64 [in_features], or [padded_in] if so stored."""
    if not spec.desc_act:
        return sequential_g_idx(spec, device).long()
    if g_idx is None:
        raise ValueError("act-order needs g_idx")
    return g_idx.long()
