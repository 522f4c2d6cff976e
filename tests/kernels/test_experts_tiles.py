"""Tile choice for experts is a pure function: what it must never return, and what it should return on an H100."""

from __future__ import annotations

from itertools import product

import pytest

from graftq.quant_linear.gpu.experts.tile_heuristics import (
    choose_matrix,
    choose_sweep,
    choose_tokens,
    choose_vector,
    slots_per_expert,
    tiles_bound,
)
from graftq.quant_linear.gpu.tile_heuristics import Device, Tile
from graftq.quant_linear.gpu.tiled_layout import PADDED_N

H100 = Device("cuda", 90, 132)
OTHERS = [Device("cuda", 80, 108), Device("hip", 0, 304), Device("xpu", 0, 64)]


def assert_launchable(tile: Tile, atoms: int) -> None:
    assert tile.rows % 64 == 0
    assert PADDED_N % tile.rows == 0
    assert tile.tokens == 1 or tile.tokens >= 16
    assert atoms % tile.unroll == 0
    assert 1 <= tile.splits <= atoms


@pytest.mark.parametrize("device", [H100, *OTHERS], ids=str)
def test_every_tile_can_be_launched(device: Device):
    for bits, n, atoms, experts, top_k in product(
        (2, 3, 4, 8), (64, 1536, 28672), (1, 6, 32, 112), (2, 8, 128, 512), (1, 2, 16)
    ):
        if top_k <= experts:
            assert_launchable(choose_vector(device, bits, n, atoms, top_k), atoms)
            for tokens in (1, 2, 17, 300, 4096):
                slots = tokens * top_k
                block = choose_tokens(device, slots, experts)
                tile = choose_matrix(device, bits, n, atoms, slots, experts, block)
                assert tile.tokens == block
                assert_launchable(tile, atoms)
                assert 1 <= choose_sweep(slots, experts, block) <= 16


@pytest.mark.parametrize("tokens", [16, 64])
def test_the_tiles_suffice_however_the_slots_fall(tokens: int):
    for slots, experts in product((1, 7, 16, 100), (2, 5, 200)):
        for share in (1, 3, slots):  # so many to each expert, until none are left
            counts = [min(share, max(0, slots - share * expert)) for expert in range(experts - 1)]
            counts.append(slots - sum(counts))
            assert sum(-(-count // tokens) for count in counts) <= tiles_bound(slots, experts, tokens)


def test_slots_of_an_expert_that_has_any():
    assert slots_per_expert(1, 8) == pytest.approx(1)
    assert slots_per_expert(8192, 8) == pytest.approx(1024)
    assert 16 / slots_per_expert(16, 128) == pytest.approx(15.1, abs=0.1)


@pytest.mark.parametrize(
    ("n", "atoms", "top_k", "splits"),
    [(28672, 32, 2, 1), (4096, 112, 2, 10), (1536, 16, 8, 4), (2048, 6, 8, 3)],
    ids=["Mixtral up", "Mixtral down", "Qwen3 up", "Qwen3 down"],
)
def test_one_token_fills_the_device_once(n: int, atoms: int, top_k: int, splits: int):
    tile = choose_vector(H100, 4, n, atoms, top_k)
    assert tile.splits == splits
    # Half as many of twice the rows are resident, or a few more: they take less than twice the registers.
    assert 0.5 < n // tile.rows * top_k * splits / ((8 if tile.rows == 64 else 5) * H100.processors) <= 1


@pytest.mark.parametrize(
    ("experts", "slots", "block"),
    [(8, 4, 16), (8, 32, 16), (8, 64, 16), (8, 128, 32), (8, 256, 64), (8, 1024, 64), (8, 8192, 128), (128, 128, 16),
     (128, 2048, 32), (128, 4096, 64), (128, 32768, 128)],
)  # fmt: skip
def test_a_tile_holds_what_an_expert_is_likely_to_get(experts: int, slots: int, block: int):
    assert choose_tokens(H100, slots, experts) == block


def test_tiles_of_one_expert_go_through_its_weights_together():
    assert choose_sweep(8192, 8, 128) == 8
    assert choose_sweep(32, 8, 16) == 1
