"""The kernel that repacks weights while a model loads gives the very words that torch gives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.projections import Shape, make

from graftq.quant_linear.gpu.tile_words import to_tiles, to_tiles_by_kernel
from graftq.quant_linear.gpu.tiled_layout import TiledLayout
from graftq.quant_linear.row_order import RowOrder

SHAPES = [
    Shape(bits=bits, k=k, n=n, group=group, act_order=act_order)
    for bits in (2, 3, 4, 8)
    for k, n, group, act_order in [(128, 64, -1, False), (416, 200, 32, True), (288, 72, 48, True)]
]


def words_of(shape: Shape) -> torch.Tensor:
    """Random words, those that fill up the last codes' included."""
    spec = shape.spec()
    return torch.randint(-(2**31), 2**31, (spec.packed_rows, spec.padded_out), dtype=torch.int64).to(torch.int32)


def order_of(shape: Shape) -> RowOrder:
    layout, g_idx = TiledLayout(shape.spec()), make(shape).g_idx
    return layout.row_order(g_idx, torch.device("cpu"), layout.needs_units(g_idx))


def assert_same(qweight: torch.Tensor, bits: int, order: RowOrder, source: torch.Tensor, device: str) -> None:
    expected = to_tiles(qweight, bits, order, source)
    moved = replace(order, order=None if order.order is None else order.order.to(device))
    found = to_tiles_by_kernel(qweight.to(device), bits, moved, source.to(device))
    assert found.keys() == expected.keys()
    for name, words in expected.items():
        assert torch.equal(found[name].cpu(), words), name


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shuffled_columns_and_padding(shape: Shape, device: str) -> None:
    source = torch.randperm(256) - 1
    assert_same(words_of(shape), shape.bits, order_of(shape), source.where(source < shape.n, -1), device)


@pytest.mark.parametrize("bits", [3, 4])
def test_more_places_than_rows(bits: int, device: str) -> None:
    shape = Shape(bits=bits, k=132, n=64, group=-1)
    assert_same(words_of(shape), bits, order_of(shape).padded(512), torch.arange(64), device)


def test_a_view_of_the_words(device: str) -> None:
    shape = Shape(k=128, n=128)
    assert_same(words_of(shape)[:, 64:], 4, order_of(shape), torch.arange(64), device)
