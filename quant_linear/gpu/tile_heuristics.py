"""The choice of a tile for a product: a pure function of the product and the device. Nothing is tuned at run time.

The number of tokens decides the shape of a tile. The splits of K fill the device once, with as many programs as can be
resident at the same time, since a second, partial wave costs as much as a full one (``docs/performance.md``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from graftq.quant_linear.gpu.targets import Device


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


ASYNCHRONOUS = (90, 100, 103)
"""Compute capabilities whose matrix instructions run beside others: Hopper's and the large Blackwell's."""


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
    atoms = k // 128
    if device.matrix_units == "mma":
        tile = _choose_mma(device, bits, group, n, atoms, m)
    else:
        tile = _choose_portable(device, group, n, atoms, m)
    return None if tile is None else fitted(device, bits, tile, 128 // group if 0 < group < 128 else 1)


def _choose_mma(device: Device, bits: int, group: int, n: int, atoms: int, m: int) -> Tile | None:
    if m > FUSED_TOKENS:
        return None
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


@dataclass(frozen=True)
class PortableTiles:
    """What tiles of the portable path may be on a kind of device, so that nothing spills; nothing of it was timed.

    Attributes:
        tokens: The most tokens of a tile.
        warps: For 64 output rows.
        stages: Depth of the software pipeline.
        fused: Tokens up to which unpacking in the product is expected to beat dequantized weights.
    """

    tokens: int
    warps: int
    stages: int
    fused: int


def portable_tiles(device: Device) -> PortableTiles:
    """The limits of the portable path, from compiled code (``docs/devices.md``)."""
    if device.matrix_units == "mfma":
        return PortableTiles(tokens=64, warps=4, stages=1, fused=512)
    if device.matrix_units == "wmma":
        # A wave of RDNA 3 holds each operand twice, once in either half: 64 tokens spill.
        return PortableTiles(tokens=32 if device.arch.startswith("gfx11") else 64, warps=4, stages=1, fused=256)
    # Scalar multiplications: 16 tokens take as long as three single ones, and dequantizing as long as 32 tokens.
    return PortableTiles(tokens=16, warps=8, stages=1, fused=32)


def _choose_portable(device: Device, group: int, n: int, atoms: int, m: int) -> Tile | None:
    limits = portable_tiles(device)
    if m > limits.fused:
        return None
    if m == 1 and (group == 0 or group >= 128):
        return portable_vector(device, n, atoms, 1)
    tokens = next((tokens for tokens in (16, 32, 64) if m <= tokens <= limits.tokens), limits.tokens)
    return portable_matrix(device, n, atoms, -(-m // tokens), tokens)


def portable_vector(device: Device, n: int, atoms: int, copies: int) -> Tile:
    """The tile of one token's product, of which there are ``copies``; for devices without "mma"."""
    unroll = 2 if atoms % 2 == 0 else 1
    splits = tile_splits(8 * device.processors, n, 64, copies, atoms, shortest=2)
    return Tile(64, 1, unroll, filled(splits, atoms, unroll), stages=1)


def portable_matrix(device: Device, n: int, atoms: int, tiles_m: int, tokens: int) -> Tile:
    """The tile of a product in ``tiles_m`` tiles of ``tokens``; for devices without "mma"."""
    limits = portable_tiles(device)
    splits = tile_splits(4 * device.processors, n, 64, tiles_m, atoms, shortest=4)
    return Tile(64, tokens, 1, splits, warps=limits.warps, stages=limits.stages)


def shared_bytes(device: Device, bits: int, tile: Tile, per_atom: int) -> int:
    """At least as much shared memory as Triton gives a program of ``tile``.

    Args:
        device: Where it runs.
        bits: Code width.
        tile: Of any kernel.
        per_atom: Groups of an atom's 128 input rows, at least 1.
    """
    if tile.tokens == 1:
        return 4096  # nothing but the sum over a row's columns
    if device.matrix_units != "mma":  # both operands pass through it; scalar products convert them to float32 before
        return 128 * (2 if device.matrix_units else 4) * (tile.rows + tile.tokens)
    ahead = max(1, tile.stages - 1)
    # Asynchronous products read one more buffer while the next is filled.
    activations = 256 * tile.tokens * (ahead + (tile.stages > 1 and device.capability in ASYNCHRONOUS))
    weights = tile.rows * (16 * bits + 8 * per_atom) * ahead  # codes, and a scale and a zero point of four bytes each
    # Where the product is not asynchronous, Triton passes unpacked 3-bit weights through it, one atom at a time.
    passing = 256 * tile.rows if bits == 3 and tile.unroll == 1 and device.capability not in ASYNCHRONOUS else 0
    return max((activations + weights) * tile.unroll + passing, 4 * tile.rows * tile.tokens)  # or the sums, at the end


def fitted(device: Device, bits: int, tile: Tile, per_atom: int) -> Tile:
    """``tile``, or one that fits the device's shared memory: of the same tokens, unless there is none of more than 64.

    Arguments as for :func:`shared_bytes`.
    """
    while shared_bytes(device, bits, tile, per_atom) > device.shared_memory:
        if tile.unroll > 1:
            tile = replace(tile, unroll=1)
        elif tile.stages > 1:
            tile = replace(tile, stages=tile.stages - 1)
        elif tile.rows > 64:
            tile = replace(tile, rows=64, warps=max(4, tile.warps // 2))
        elif tile.tokens > 64:
            tile = replace(tile, tokens=64)
        else:
            break
    return tile


def _tiles(n: int, rows: int) -> int:
    return -(-n // rows)


def tile_splits(resident: int, n: int, rows: int, tiles_m: int, atoms: int, shortest: int) -> int:
    """The most splits, up to 32, with at most ``resident`` programs of at least ``shortest`` atoms each."""
    return max(1, min(resident // (_tiles(n, rows) * tiles_m), atoms // shortest, 32))


def filled(splits: int, atoms: int, unroll: int) -> int:
    """How many of ``splits`` splits of K get any atoms, if each takes whole steps of ``unroll`` atoms."""
    per_split = -(-atoms // (splits * unroll)) * unroll
    return -(-atoms // per_split)
