"""The tiles that ``tune.py`` tries, as recipes, which become tiles where the size of a product is known."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from graftq.quant_linear.gpu.tile_heuristics import Device, Tile


def vector(rows: int, unroll: int, programs: int, registers: int | None = None, warps: int = 4) -> Tile:
    return Tile(rows, 1, unroll, programs, warps, 1, registers)


def matrix(
    rows: int, tokens: int, unroll: int, programs: int, stages: int = 3, registers: int | None = None, warps: int = 4
) -> Tile:
    return Tile(rows, tokens, unroll, programs, warps, stages, registers, scale_weights=rows * tokens >= 16384)


# Recipes: tiles whose ``splits`` is how many programs each processor shall have; the most promising first. Registers as
# compiled for sm_90 without a cap: 64x1 55, 56 and 76 (unroll 1, 2, 4), 128x1 94; with 3 bits 60, 72, 86 (2, 4, 8) and
# 120, 87 (128 rows; 2, 4); 64x16 71 and 80; 64x64 156 and 168; 128x64 126 (8 warps) and 254 (4); 128x128 159.
VECTOR = (
    vector(64, 1, 8), vector(64, 4, 6), vector(128, 2, 5), vector(64, 2, 8), vector(64, 4, 8, 64), vector(64, 2, 9),
    vector(64, 2, 10, 48), vector(64, 1, 12, 40), vector(128, 2, 4), vector(64, 1, 16), vector(64, 2, 6),
    vector(128, 1, 5), vector(128, 2, 8, 64), vector(128, 4, 4), vector(64, 2, 16), vector(128, 4, 5, 96),
    vector(64, 1, 9), vector(128, 2, 4, warps=8),
)  # fmt: skip
VECTOR_3_BITS = (
    vector(128, 4, 5), vector(64, 4, 7), vector(128, 2, 4), vector(64, 2, 10, 48), vector(64, 4, 8, 64),
    vector(64, 1, 12, 40), vector(128, 4, 8, 64), vector(64, 2, 8), vector(128, 2, 6, 80), vector(64, 8, 5),
    vector(128, 4, 10), vector(64, 4, 14), vector(128, 2, 8), vector(64, 1, 16), vector(128, 2, 5, 96),
    vector(64, 8, 8, 64),
)  # fmt: skip
FEW_TOKENS = (
    matrix(64, 16, 1, 7), matrix(64, 16, 2, 5), matrix(64, 16, 1, 6), matrix(64, 16, 1, 4), matrix(64, 16, 2, 4),
    matrix(64, 16, 2, 6, 2), matrix(64, 16, 1, 7, 2), matrix(64, 16, 1, 5, 4), matrix(64, 16, 1, 8, 3, 64),
    matrix(64, 16, 2, 5, 2), matrix(64, 16, 1, 7, 4), matrix(64, 16, 2, 8, 2, 64), matrix(64, 16, 2, 3),
    matrix(64, 16, 1, 5, 2), matrix(64, 16, 1, 5, 5), matrix(64, 16, 1, 5), matrix(64, 16, 1, 3),
)  # fmt: skip
TOKENS_64 = (
    matrix(64, 64, 2, 4), matrix(64, 64, 2, 2), matrix(64, 64, 1, 3), matrix(64, 64, 1, 4, 2, 128),
    matrix(64, 64, 1, 3, 3, 168), matrix(128, 64, 1, 2, 3, 128, warps=8), matrix(64, 64, 1, 2), matrix(64, 64, 2, 2, 2),
    matrix(64, 64, 1, 4, 3, 128), matrix(128, 64, 1, 2), matrix(64, 64, 2, 4, 2, 128), matrix(64, 64, 1, 3, 4),
    matrix(128, 64, 1, 1, 3, warps=8), matrix(64, 64, 1, 3, 2), matrix(128, 64, 1, 2, 2, 128, warps=8),
    matrix(128, 64, 1, 1, 4, warps=8), matrix(64, 64, 1, 2, 4), matrix(128, 64, 1, 2, 2),
    matrix(128, 64, 2, 1, 3, warps=8), matrix(64, 64, 1, 7, 2, 128),
)  # fmt: skip
TOKENS_128 = (
    matrix(64, 64, 1, 4, 3, 128), matrix(64, 64, 1, 3), matrix(128, 64, 1, 2, 3, 128, warps=8), matrix(64, 64, 2, 2),
    matrix(128, 128, 1, 1, warps=8), matrix(64, 64, 1, 4, 2, 128), matrix(128, 64, 1, 2), matrix(64, 64, 2, 4),
    matrix(128, 64, 1, 1, warps=8), matrix(128, 128, 1, 2, 3, 128, warps=8), matrix(64, 64, 1, 2),
    matrix(128, 64, 1, 2, 4, 128, warps=8), matrix(128, 128, 1, 2, 2, 128, warps=8), matrix(64, 64, 1, 3, 4),
    matrix(128, 128, 1, 1, 4, warps=8), replace(matrix(128, 128, 1, 1, warps=8), scale_weights=False),
)  # fmt: skip


def recipes(bits: int, tokens: int) -> tuple[Tile, ...]:
    """For so many tokens of a dense layer; experts have 1 or few."""
    if tokens == 1:
        return VECTOR_3_BITS if bits == 3 else VECTOR
    return FEW_TOKENS if tokens <= 16 else TOKENS_64 if tokens <= 64 else TOKENS_128


def fitted(recipe: Tile, device: Device, tiles: int, atoms: int) -> Iterator[Tile]:
    """The recipe's tile where there are ``tiles`` such, none of its splits without atoms; none if it does not fit."""
    if atoms % recipe.unroll == 0:
        most = max(1, min(32, recipe.splits * device.processors // tiles))
        useful = {-(-atoms // each) for each in range(recipe.unroll, atoms + 1, recipe.unroll)}
        yield replace(recipe, splits=max(splits for splits in useful if splits <= most))
