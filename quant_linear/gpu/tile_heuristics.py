"""The choice of a tile for a product: a pure function of the product and the device. Nothing is tuned at run time.

The number of tokens decides the shape of a tile. The splits of K fill the device once, with as many programs as can be
resident at the same time, since a second, partial wave costs as much as a full one (``docs/performance.md``).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class Device:
    """What a tile choice depends on.

    Attributes:
        backend: Triton's name, "cuda", "hip" or "xpu".
        capability: Major times ten plus minor, CUDA only; else 0.
        processors: Multiprocessors, or what the backend calls them.
    """

    backend: str
    capability: int
    processors: int


@dataclass(frozen=True)
class Tile:
    """One launch configuration.

    Attributes:
        rows: Output rows, a multiple of 64.
        tokens: Tokens; 1 for the vector kernel.
        unroll: Atoms of 128 input rows per step.
        splits: Splits of K.
        warps: Warps per program; a multiple of four, four for each 64 rows or all 128.
        stages: Depth of the software pipeline.
        registers: Cap per thread, or None; with fewer registers, more programs are resident.
        scale_weights: Whether the scales multiply the weights instead of the products.
    """

    rows: int
    tokens: int
    unroll: int
    splits: int
    warps: int = 4
    stages: int = 3
    registers: int | None = None
    scale_weights: bool = False

    def options(self, overlap: bool) -> tuple[tuple[str, int | bool], ...]:
        """For the launch; ``overlap`` is whether the kernel may start before the one before it ends."""
        options: list[tuple[str, int | bool]] = [("num_warps", self.warps), ("num_stages", self.stages)]
        if self.registers is not None:
            options.append(("maxnreg", self.registers))
        if overlap:
            options.append(("launch_pdl", True))
        return tuple(options)


FUSED_TOKENS = 1024
"""Tokens up to which unpacking in the product beats dequantized weights and cuBLAS (measured on an H100 only)."""


@lru_cache(maxsize=4096)
def choose(device: Device, bits: int, group: int, n: int, k: int, m: int) -> Tile | None:
    """The tile for ``m`` tokens by ``n`` output and ``k`` input rows, or None for dequantized weights.

    Args:
        device: Where it runs.
        bits: Code width.
        group: Input rows per scale; 0 for one group.
        n: Output rows.
        k: Input rows as packed, a multiple of 128.
        m: Tokens, at least 1.
    """
    if m > FUSED_TOKENS:
        return None
    atoms = k // 128
    unroll = 2 if atoms % 2 == 0 else 1
    if m == 1 and (group == 0 or group >= 128):
        rows = 128 if bits == 2 else 64  # the fewer bits, the more the activations' own loads weigh
        splits = tile_splits(8 * device.processors, n, rows, 1, atoms, shortest=2)
        return Tile(rows, 1, unroll, filled(splits, atoms, unroll), stages=1)
    hopper = device.capability == 90
    if m <= 16:
        splits = tile_splits(5 * device.processors, n, 64, 1, atoms, shortest=4)
        return Tile(64, 16, unroll if splits == 1 or atoms >= 12 * splits else 1, splits)
    if m <= 32:
        return Tile(64, 32, 1, tile_splits(4 * device.processors, n, 64, 1, atoms, shortest=4))
    cap = 128 if hopper else None
    if m > 64 or _tiles(n, 64) * 2 > 4 * device.processors:
        # Two groups of four warps share the activations of a tile.
        tiles_m = -(-m // 64)
        if _tiles(n, 64) * tiles_m <= device.processors and atoms < 64:
            return Tile(64, 64, unroll, tile_splits(2 * device.processors, n, 64, tiles_m, atoms, shortest=8))
        if tiles_m > 1 and _tiles(n, 128) * tiles_m > 2 * device.processors:
            return Tile(128, 128, 1, 1, warps=8, registers=cap, scale_weights=True)
        splits = tile_splits(2 * device.processors, n, 128, tiles_m, atoms, shortest=8)
        return Tile(128, 64, 1, splits, warps=8, registers=cap)
    return Tile(64, 64, unroll, tile_splits(2 * device.processors, n, 64, 1, atoms, shortest=8))


def _tiles(n: int, rows: int) -> int:
    return -(-n // rows)


def tile_splits(resident: int, n: int, rows: int, tiles_m: int, atoms: int, shortest: int) -> int:
    """The most splits, up to 32, with at most ``resident`` programs of at least ``shortest`` atoms each."""
    return max(1, min(resident // (_tiles(n, rows) * tiles_m), atoms // shortest, 32))


def filled(splits: int, atoms: int, unroll: int) -> int:
    """How many of ``splits`` splits of K get any atoms, if each takes whole steps of ``unroll`` atoms."""
    per_split = -(-atoms // (splits * unroll)) * unroll
    return -(-atoms // per_split)
