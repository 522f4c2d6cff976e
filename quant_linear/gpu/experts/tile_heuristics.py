"""The choice of tiles for the products of experts: pure functions of the layer's sizes and the device.

The host does not know how the router distributes the tokens, so the choice assumes even routing. The measurements of
the dense kernels (``docs/performance.md``) apply to each product:

* One token: each of its experts has tiles of its own; eight programs of the vector kernel are resident on a
  multiprocessor. The first product of Mixtral (2 experts, 448 tiles each) fills an H100 without splits of K, and then
  takes longer steps. The second one, and both of Qwen3, need splits; long sums need larger tiles.
* Few tokens per expert: tiles of 16 tokens take no longer than smaller ones would, since reading the weights takes the
  time. They hold all slots of nearly any expert, so that its weights are read once.
* Many: tiles of 64 and 128 tokens, shared by two groups of four warps.
"""

from __future__ import annotations

from functools import lru_cache

from graftq.quant_linear.gpu.targets import Device
from graftq.quant_linear.gpu.tile_heuristics import (
    Tile,
    filled,
    fitted,
    portable_matrix,
    portable_tiles,
    portable_vector,
    tile_splits,
)

TOKENS_AT_ONCE = 4096
"""The most tokens that go through a layer at a time: bounds the memory between its products."""


def has_vector_form(group: int) -> bool:
    """Whether the kernels for a single token support groups of this size."""
    return group % 128 == 0


def tiles_bound(slots: int, experts: int, tokens: int) -> int:
    """Tiles of ``tokens`` slots that suffice however the slots are distributed, as ``prepare_kernel`` counts them."""
    return slots // tokens + min(experts, slots)


@lru_cache(maxsize=1024)
def slots_per_expert(slots: int, experts: int) -> float:
    """The expected slots of an expert that has any, if the router chooses evenly."""
    return slots / (experts * (1 - (1 - 1 / experts) ** slots))


@lru_cache(maxsize=1024)
def choose_tokens(device: Device, slots: int, experts: int) -> int:
    """Slots in a tile, the same for both products, since they share the routing."""
    mean = slots_per_expert(slots, experts)
    if device.matrix_units == "mma":  # the activations of 128 tokens take 32 KB of shared memory
        most_tokens = 64 if device.backend == "cuda" and device.shared_memory < 64 * 1024 else 128
    else:
        most_tokens = portable_tiles(device).tokens
    for tokens, most in ((16, 10.0), (32, 22.0), (64, 160.0)):
        if mean <= most:
            return min(tokens, most_tokens)
    return most_tokens


@lru_cache(maxsize=1024)
def choose_sweep(slots: int, experts: int, tokens: int) -> int:
    """Tiles of slots that go through the weights together: those of one expert, at most 16 for the caches."""
    return max(1, min(16, round(slots_per_expert(slots, experts) / tokens)))


@lru_cache(maxsize=4096)
def choose_matrix(
    device: Device, bits: int, n: int, atoms: int, slots: int, experts: int, tokens: int, per_atom: int = 1
) -> Tile:
    """The tile of one product for ``slots`` slots in tiles of ``tokens``.

    Args:
        device: Where it runs.
        bits: Code width.
        n: Output rows of an expert.
        atoms: Atoms of 128 input rows.
        slots: Tokens times experts of each.
        experts: Experts of the layer.
        tokens: From :func:`choose_tokens`.
        per_atom: Groups of an atom's 128 input rows, at least 1.
    """
    mean = slots_per_expert(slots, experts)
    tiles_m = max(1, round(slots / mean)) * max(1, -(-int(mean) // tokens))
    if device.matrix_units == "mma":
        tile = _choose_mma(device, n, atoms, tiles_m, tokens)
    else:
        tile = portable_matrix(device, n, atoms, tiles_m, tokens)
    return fitted(device, bits, tile, per_atom)


def _choose_mma(device: Device, n: int, atoms: int, tiles_m: int, tokens: int) -> Tile:
    cap = 128 if device.capability == 90 else None
    if tokens == 16:
        splits = tile_splits(5 * device.processors, n, 64, tiles_m, atoms, shortest=4)
        unroll = 2 if atoms % 2 == 0 and splits == 1 else 1
        return Tile(64, 16, unroll, splits)
    if tokens == 32:
        return Tile(64, 32, 1, tile_splits(4 * device.processors, n, 64, tiles_m, atoms, shortest=4))
    if tokens == 64:
        if -(-n // 128) * tiles_m <= device.processors:
            return Tile(64, 64, 1, tile_splits(4 * device.processors, n, 64, tiles_m, atoms, shortest=8), registers=cap)
        return Tile(128, 64, 1, 1, warps=8, registers=cap)
    return Tile(128, 128, 1, 1, warps=8, registers=cap, scale_weights=True)


@lru_cache(maxsize=1024)
def choose_vector(device: Device, bits: int, n: int, atoms: int, top_k: int) -> Tile:
    """The tile of one product for a single token's ``top_k`` experts; other arguments as :func:`choose_matrix`."""
    if device.matrix_units != "mma":
        return portable_vector(device, n, atoms, top_k)
    unroll = 2 if atoms % 2 == 0 else 1
    rows, resident = (128 if bits == 2 else 64), 8  # as for linear layers
    registers = None
    if bits in (3, 4) and tile_splits(8 * device.processors, n, 64, top_k, atoms, shortest=2) == 1:
        unroll = 4 if atoms % 4 == 0 else unroll
        registers = 64 if bits == 4 else None
    elif bits == 4 and atoms >= 64:
        rows, resident = 128, 5
    splits = tile_splits(resident * device.processors, n, rows, top_k, atoms, shortest=2)
    return Tile(rows, 1, unroll, filled(splits, atoms, unroll), stages=1, registers=registers)
