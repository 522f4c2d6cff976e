"""Tile choice is a pure function: what it must never return, and what was measured to be best."""

from __future__ import annotations

from itertools import product

import pytest

from graftq.quant_linear.gpu.tile_heuristics import FUSED_TOKENS, Device, choose
from graftq.quant_linear.gpu.tiled_layout import PADDED_N

H100 = Device("cuda", 90, 132)
OTHERS = [Device("cuda", 80, 108), Device("hip", 0, 304), Device("xpu", 0, 64)]


@pytest.mark.parametrize("device", [H100, *OTHERS], ids=str)
def test_every_tile_can_be_launched(device: Device):
    for bits, group, n, k, m in product(
        (2, 3, 4, 8), (0, 16, 128), (8, 4096, 28672, 152064), (128, 384, 4096, 14336), (1, 2, 16, 17, 64, 65, 256, 1024)
    ):
        tile = choose(device, bits, group, n, k, m)
        if tile is None:
            assert device.matrix_units != "mma"
            assert m > 16
            continue
        assert tile.rows % 64 == 0
        assert PADDED_N % tile.rows == 0
        assert tile.tokens == 1 or tile.tokens >= 16
        assert k // 128 % tile.unroll == 0
        assert 1 <= tile.splits <= k // 128
        assert tile.tokens > 1 or (m == 1 and group % 128 == 0)


def test_large_products_use_plain_weights():
    assert choose(H100, 4, 128, 4096, 4096, FUSED_TOKENS) is not None
    assert choose(H100, 4, 128, 4096, 4096, FUSED_TOKENS + 1) is None


@pytest.mark.parametrize(
    ("n", "k", "splits"), [(28672, 4096, 2), (8192, 8192, 8), (4096, 14336, 14), (4096, 4096, 16)], ids=str
)
def test_one_token_fills_the_device_once(n: int, k: int, splits: int):
    assert choose(H100, 4, 128, n, k, 1).splits == splits


def test_choice_is_cached():
    assert choose(H100, 4, 128, 4096, 4096, 5) is choose(H100, 4, 128, 4096, 4096, 5)
