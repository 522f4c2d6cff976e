"""Where the input rows of a projection go, so that every run of ``unit`` rows shares its scales."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from graftq.quant_linear.packing import sequential_g_idx
from graftq.quant_linear.spec import QuantSpec


@dataclass(frozen=True)
class Places:
    """Where each stored input row goes.

    Attributes:
        order: int64 [rows], the stored row at each place, beyond all of them for padding; None if nothing moves.
        groups: int64 [rows / unit], the group of each unit.
        unit: Input rows per scale.
    """

    order: torch.Tensor | None
    groups: torch.Tensor
    unit: int

    @property
    def rows(self) -> int:
        """Number of places."""
        return len(self.groups) * self.unit


def stored_rows(spec: QuantSpec) -> int:
    """Codes that a column of ``qweight`` holds once it is padded to whole blocks of 32."""
    return -(-spec.packed_rows // spec.bits) * 32


def unit_of(spec: QuantSpec, g_idx: torch.Tensor | None, units: Sequence[int]) -> int:
    """The first of ``units`` (descending) that divides every group; the last if none does."""
    if spec.num_groups == 1:
        lengths = {stored_rows(spec)}
    elif not spec.desc_act:
        lengths = {spec.group_size}
    else:
        lengths = set(torch.bincount(_group(spec, g_idx, None), minlength=spec.num_groups).tolist())
    return next((unit for unit in units if not any(length % unit for length in lengths)), units[-1])


def places_of(spec: QuantSpec, g_idx: torch.Tensor | None, unit: int, device: torch.device) -> Places:
    """Where the input rows go: sorted by group (stable), each group padded to whole units.

    Args:
        spec: The projection.
        g_idx: As stored; must be there if the spec says act-order.
        unit: Rows that share a scale.
        device: Where to make the tensors.
    """
    stored = stored_rows(spec)
    if spec.num_groups == 1 or (not spec.desc_act and spec.group_size % unit == 0):
        groups = torch.arange(-(-stored // unit), device=device) * unit // spec.group_size
        return Places(None, groups.clamp(max=spec.num_groups - 1), unit)
    group = _group(spec, g_idx, device)
    by_group = torch.argsort(group, stable=True)
    sorted_group = group[by_group]
    counts = torch.bincount(group, minlength=spec.num_groups)
    units = (counts + unit - 1).div(unit, rounding_mode="floor")
    first = (units.cumsum(0) - units) * unit
    rank = torch.arange(len(group), device=device) - (counts.cumsum(0) - counts)[sorted_group]
    rest = torch.arange(len(group), stored, device=device)  # rows that fill up the last words
    used, filling = int(units.sum()) * unit, -(-len(rest) // unit)
    order = torch.full((used + filling * unit,), stored, device=device)
    order[first[sorted_group] + rank] = by_group
    order[used : used + len(rest)] = rest
    last = torch.full((filling,), spec.num_groups - 1, device=device)
    groups = torch.cat((torch.repeat_interleave(units), last))
    return Places(order, groups, unit)


def _group(spec: QuantSpec, g_idx: torch.Tensor | None, device: torch.device | None) -> torch.Tensor:
    if not spec.desc_act:
        return sequential_g_idx(spec, device).long()
    if g_idx is None:
        raise ValueError("act-order needs g_idx")
    return g_idx[: spec.in_features].long()
