"""Devices that are not there: what fits them, what is refused on them, and what is claimed of them."""

from __future__ import annotations

import hashlib
from itertools import product

import pytest

from graftq.quant_linear.gpu.experts.tile_heuristics import choose_matrix, choose_tokens, choose_vector
from graftq.quant_linear.gpu.targets import COMPILES, HAS_RUN, Device, refusal
from graftq.quant_linear.gpu.tile_heuristics import Tile, choose, fitted, shared_bytes

NVIDIA = {70: 80, 75: 40, 80: 108, 86: 82, 89: 128, 90: 132, 100: 148, 120: 170}
AMD = {"gfx906": 60, "gfx90a": 104, "gfx942": 304, "gfx1030": 80, "gfx1100": 96, "gfx1201": 64}
DEVICES = [
    *(Device("cuda", capability, processors) for capability, processors in NVIDIA.items()),
    *(Device("hip", 0, processors, arch) for arch, processors in AMD.items()),
    Device("hip", 0, 40),
    Device("xpu", 0, 64),
    Device("cuda", 86, 16, shared=48 * 1024),
    Device("cuda", 130, 200),
]
GRID = (
    (2, 3, 4, 8),
    (0, 16, 32, 128),
    (64, 1536, 4096, 28672),
    (128, 384, 4096, 14336),
    (1, 2, 16, 17, 32, 33, 64, 65, 128, 512, 1024, 1025),
)


def name(device: Device) -> str:
    return f"{device.name}-{device.shared_memory // 1024}K"


@pytest.mark.parametrize("device", DEVICES, ids=name)
def test_what_does_not_fit_is_never_chosen(device: Device):
    for bits, group, n, k, m in product(*GRID):
        per_atom = 128 // group if 0 < group < 128 else 1
        tile = choose(device, bits, group, n, k, m)
        assert tile is None or shared_bytes(device, bits, tile, per_atom) <= device.shared_memory
        tokens = choose_tokens(device, 2 * m, 8)
        tile = choose_matrix(device, bits, n, k // 128, 2 * m, 8, tokens, per_atom)
        assert tile.tokens == tokens
        assert shared_bytes(device, bits, tile, per_atom) <= device.shared_memory


@pytest.mark.parametrize(
    ("capability", "bits", "tile", "per_atom", "given"),
    [
        (86, 3, Tile(64, 32, 1, 1), 4, 40960),
        (86, 3, Tile(64, 64, 2, 1), 4, 81920),
        (86, 3, Tile(128, 64, 1, 1, warps=8), 1, 77824),
        (86, 3, Tile(128, 128, 1, 1, warps=8, scale_weights=True), 4, 114688),
        (86, 4, Tile(128, 128, 1, 1, warps=8, scale_weights=True), 4, 86016),
        (90, 3, Tile(128, 128, 1, 1, warps=8, registers=128, scale_weights=True), 1, 110592),
        (90, 4, Tile(64, 64, 2, 1), 1, 114688),
    ],
)
def test_shared_memory_is_foreseen(capability: int, bits: int, tile: Tile, per_atom: int, given: int) -> None:
    """What Triton 3.6 gave these programs, asymmetric, by ``benchmarks/compile_matrix.py``."""
    assert given <= shared_bytes(Device("cuda", capability, 100), bits, tile, per_atom) <= 1.2 * given


def test_a_tile_that_does_not_fit_gives_up_steps_then_stages_then_rows():
    tile = Tile(128, 128, 2, 1, warps=8)
    sizes = [128 * 1024, 64 * 1024, 40 * 1024]
    found = [fitted(Device("cuda", 86, 82, shared=size), 4, tile, 1) for size in sizes]
    assert [(each.unroll, each.stages, each.rows, each.warps) for each in found] == [
        (1, 3, 128, 8),
        (1, 2, 128, 8),
        (1, 1, 64, 4),
    ]
    assert fitted(Device("cuda", 90, 132), 4, Tile(64, 64, 2, 1), 1) == Tile(64, 64, 2, 1)


@pytest.mark.parametrize(("capability", "digest"), [(90, "6293d6f3624df5dd"), (80, "17c1ca5d590edd8b")])
def test_tiles_that_were_measured_stay(capability: int, digest: str):
    """Tiles of an H100 and an A100; a new digest needs new measurements."""
    device = Device("cuda", capability, NVIDIA[capability])
    bits, _, n, k, m = GRID
    found = [choose(device, *arguments) for arguments in product(bits, (0, 32, 128), n, k, m)]
    for width, rows, columns, experts, tokens in product(bits, n, k, (8, 128), (1, 2, 16, 64, 300, 4096)):
        found.append(choose_vector(device, width, rows, columns // 128, 2))
        block = choose_tokens(device, tokens * 2, experts)
        found.append(choose_matrix(device, width, rows, columns // 128, tokens * 2, experts, block))
    assert hashlib.sha256(repr(found).encode()).hexdigest()[:16] == digest


@pytest.mark.parametrize(("arch", "tokens"), [("gfx942", 64), ("gfx1100", 32), ("gfx1201", 64), ("", 16)])
def test_tiles_of_amd_are_small_enough_for_its_registers(arch: str, tokens: int):
    device = Device("hip", 0, 96, arch)
    tiles = [choose(device, 4, 128, 4096, 4096, m) for m in range(1, 1025)]
    assert max(tile.tokens for tile in tiles if tile) == tokens
    assert all(tile.rows == 64 and tile.stages == 1 and tile.registers is None for tile in tiles if tile)


def test_without_matrix_units_many_tokens_use_dequantized_weights():
    t4 = Device("cuda", 75, 40)
    assert [choose(t4, 4, 128, 4096, 4096, m) is None for m in (1, 32, 33, 4096)] == [False, False, True, True]


@pytest.mark.parametrize(
    ("device", "is_bfloat16", "said"),
    [
        (Device("cuda", 61, 28), False, "compute capability 6.1: Triton compiles for 7.0 and newer"),
        (Device("cuda", 75, 40), True, "compute capability 7.5 has no bfloat16 instructions"),
        (Device("cuda", 70, 80), True, "compute capability 7.0 has no bfloat16 instructions"),
    ],
)
def test_refused_by_name(device: Device, is_bfloat16: bool, said: str):
    found = refusal(device, is_bfloat16)
    assert found is not None
    assert found[0] == said


@pytest.mark.parametrize("device", DEVICES, ids=name)
def test_half_precision_is_refused_nowhere_else(device: Device):
    assert refusal(device, False) is None
    assert (refusal(device, True) is None) == (device.capability == 0 or device.capability >= 80)


def test_claims_name_their_evidence():
    assert not HAS_RUN & COMPILES
    assert Device("cuda", 90, 132).standing == "the kernels have been run on this architecture"
    assert "never run" in Device("cuda", 80, 108).standing
    assert "neither" in Device("hip", 0, 60, "gfx906").standing
