"""Before the products of experts: sorting slots by expert, and gathering for act-order, in one launch.

A *slot* is a token with one of its experts, numbered ``token * top_k + choice``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from graftq.quant_linear.kernels.launch import VARIABLE


@triton.jit
def _route(index, slots, tile_expert, expert, experts, S, tiles, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr):
    """Write the slots of one expert, in order, to whole tiles of BLOCK_M; arguments as for :func:`prepare_kernel`.

    ``s`` slots of ``e`` experts need at most ``s // BLOCK_M + min(e, s)`` tiles, however the slots are distributed. The
    tiles of an expert begin at this bound for the experts before it. So one program only counts slots of lower experts,
    and needs no scan over what other programs computed.
    """
    lane = tl.arange(0, CHUNK)
    before = tl.zeros((), tl.int32)
    for start in range(0, S, CHUNK):
        found = tl.load(index + start + lane, mask=start + lane < S, other=-1).to(tl.int32)  # [CHUNK]
        before += tl.sum(((found >= 0) & (found < expert)).to(tl.int32), 0)
    first = before // BLOCK_M + tl.minimum(expert, before)
    count = tl.zeros((), tl.int32)
    for start in range(0, S, CHUNK):
        found = tl.load(index + start + lane, mask=start + lane < S, other=-1).to(tl.int32)  # [CHUNK]
        own = (found == expert).to(tl.int32)
        place = first * BLOCK_M + count + tl.cumsum(own, 0) - own
        tl.store(slots + place, start + lane, mask=own > 0)
        count += tl.sum(own, 0)
    used = tl.cdiv(count, BLOCK_M)
    rest = count + tl.arange(0, BLOCK_M)
    tl.store(slots + first * BLOCK_M + rest, tl.zeros_like(rest) + S, mask=rest < used * BLOCK_M)
    following = before + count
    end = tl.where(expert == experts - 1, tiles, following // BLOCK_M + tl.minimum(expert + 1, following))
    for start in range(first, end, 128):
        tile = start + tl.arange(0, 128)
        tl.store(tile_expert + tile, tl.where(tile < first + used, expert, -1), mask=tile < end)


@triton.jit(do_not_specialize=VARIABLE)
def prepare_kernel(
    x, index, order, gathered, slots, tile_expert,
    S, K, places, parts, blocks, share, experts, tiles, x_stride,
    ROUTE: tl.constexpr, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Sort slots into tiles of one expert each, and gather activations; grid (routing + gathering programs).

    If ROUTE, the first ``experts`` programs each write the tiles of one expert. The others, ``S * parts * blocks`` if
    there is an order and none otherwise, gather.

    Args:
        x: fp16 or bf16 [S / share, K], rows ``x_stride`` apart.
        index: Integers [S], the expert of each slot; slots whose entry is not from 0 to ``experts - 1`` are skipped.
        order: int32 [experts, parts, places]: the input row at each place, ``K`` or more for padding.
        gathered: [S, parts, places], like ``x``: ``x[slot // share, order[index[slot], part, place]]``, 0 for padding.
        slots: int32 [tiles, BLOCK_M], out: the slots of each tile, S for none.
        tile_expert: int32 [tiles], out: the expert of each tile, -1 for an unused tile, whose ``slots`` are not set.
        S, K: Slots, and input rows of ``x``.
        parts: Parts of the stack's output rows that each have an order.
        blocks: Programs for one slot and part, of BLOCK places each.
        share: Consecutive slots that read the same row of ``x``.
        tiles: ``S // BLOCK_M + min(experts, S)``.
        BLOCK_M: Slots in a tile.
        CHUNK: Entries of ``index`` that a program reads at a time.
        OVERLAP: Whether the next kernel may start before this one ends (programmatic dependent launch).
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    if ROUTE:
        if program < experts:
            _route(index, slots, tile_expert, program, experts, S, tiles, BLOCK_M, CHUNK)
            return
        program -= experts
    row = program // blocks
    slot = row // parts
    expert = tl.load(index + slot).to(tl.int32)
    if (expert < 0) | (expert >= experts):
        return
    place = program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = place < places
    # [BLOCK]
    k = tl.load(order + (expert.to(tl.int64) * parts + row % parts) * places + place, mask=inside, other=K)
    values = tl.load(x + (slot // share).to(tl.int64) * x_stride + k, mask=k < K, other=0.0)
    tl.store(gathered + row.to(tl.int64) * places + place, values, mask=inside)
