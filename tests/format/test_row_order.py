"""Row orders of several projections at once are those of each by itself, padded to the longest."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.projections import Shape

from graftq.quant_linear.row_order import order_alike, order_rows


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("unit", [8, 16, 32])
def test_each_as_by_itself(bits: int, unit: int) -> None:
    """In order, shuffled, with groups of uneven length, and stored without the padding that the others have."""
    moved = replace(Shape(bits=bits, k=120, n=8, group=32, act_order=True).spec(), padded_in=128, stored_g_idx=128)
    rows = torch.arange(128)
    g_idx = [None, rows[torch.randperm(128)] // 32, (rows % 7 // 2)[torch.randperm(128)], rows[:120].flip(0) // 32]
    specs = [replace(moved, desc_act=each is not None) for each in g_idx]
    device = torch.device("cpu")
    alone = [order_rows(spec, each, unit, device, 64) for spec, each in zip(specs, g_idx, strict=True)]
    longest = max(order.rows for order in alone)
    for own, found in zip(alone, order_alike(specs, g_idx, unit, device, 64), strict=True):
        expected = own.padded(longest)
        assert (expected.order is None) == (found.order is None)
        assert expected.order is None or expected.order.equal(found.order)
        assert expected.unit_group.equal(found.unit_group)


def test_every_row_has_one_place_in_a_unit_of_its_group() -> None:
    spec = Shape(bits=3, k=144, n=8, group=48, act_order=True).spec()
    g_idx = (torch.arange(144) * 5 % 144 // 60).int()  # of 60, 60 and 24 rows
    found = order_rows(spec, g_idx, 16, torch.device("cpu"), 128)
    assert found.order is not None
    for row in range(144):
        (place,) = (found.order == row).nonzero().flatten().tolist()
        assert found.unit_group[place // 16] == g_idx[row]
