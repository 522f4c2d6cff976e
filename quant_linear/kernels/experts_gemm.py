"""The products of experts on the matrix units: each tile multiplies tokens of one expert by its weights.

A *slot* is a token with one of its experts, numbered ``token * top_k + choice``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from graftq.quant_linear.kernels.activate import activate
from graftq.quant_linear.kernels.epilogue import sum_splits
from graftq.quant_linear.kernels.gemm import multiply_tile
from graftq.quant_linear.kernels.launch import VARIABLE
from graftq.quant_linear.kernels.unpack import halves_of


@triton.jit(do_not_specialize=VARIABLE)
def experts_matrix_kernel(
    x, codes, high, scales, zeros, bias, columns, slots, tile_expert, out, partials, counters,
    S, N, K, atoms, groups, tiles_n, tiles_m, x_stride, share, part_rows, part_stride, bias_stride, sweep,
    BITS: tl.constexpr, GROUP: tl.constexpr, SYM: tl.constexpr, PROGRAM: tl.constexpr, HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, GATED: tl.constexpr,
    MASK_K: tl.constexpr, SCALE_WEIGHTS: tl.constexpr, KEEP: tl.constexpr, OVERLAP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, UNROLL: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_N output rows of one expert for BLOCK_M of its slots, or one split of their sums; grid (tiles, SPLIT_K).

    With an activation, the sum of all splits goes through bias and activation, and half as many rows are stored if it
    is gated. Without one, each split stores its own sum, and the kernel that reads them adds them up.

    Args:
        x: fp16 or bf16 [S / share, parts, K], rows ``x_stride`` and parts ``part_stride`` apart.
        codes: int32 [experts, tiles_n, atoms, 256 * width], ``width`` bits a code (2 for 3-bit codes): the words of
            atoms of 64 output by 128 input rows, in the order that ``unpack.load_words`` describes.
        high: int32 [experts, tiles_n, atoms, 256], the top bits of 3-bit codes; read for 3 bits only.
        scales: [experts, groups, 64 * tiles_n], any float dtype.
        zeros: int32 [experts, groups, 32 * tiles_n], the zero points, two of 16 bits in an element; read if not SYM.
        bias: [experts, bias_stride], any float dtype, by column; read if HAS_BIAS, and only with an activation.
        columns: int32 [experts, 64 * tiles_n], the column of each output row, ``bias_stride`` or more for padding; read
            if HAS_BIAS.
        slots: int32 [tiles_m, BLOCK_M], the slots of each tile, S for none; from ``prepare_kernel``.
        tile_expert: int32 [tiles_m], the expert of each tile, -1 for tiles to skip; likewise.
        out: In the dtype of ``x`` or float32. With a gated activation [S, N / 2], with another [S, N], without one
            [SPLIT_K, S, N].
        partials: float32 [SPLIT_K, S, N]; used if there are an activation and SPLIT_K > 1.
        counters: int32 [tiles], zero, and left zero; likewise.
        S: Slots.
        N, K: Output rows of an expert, of 64 * ``tiles_n`` stored ones, and input rows that ``x`` has.
        atoms: Atoms of 128 input rows.
        groups: Rows of an expert's ``scales``.
        tiles_n: Tiles of 64 output rows of an expert.
        tiles_m: Tiles of slots, used or not.
        share: Consecutive slots that read the same row of ``x``.
        part_rows: Output rows that read the same part of ``x``.
        BITS, GROUP, SYM, PROGRAM, MASK_K, SCALE_WEIGHTS, KEEP, UNROLL: As in ``gemm.matrix_kernel``.
        ACTIVATION, ALPHA, LIMIT, GATED: As in ``activate.activate``; an empty name for no activation.
        OVERLAP: Whether the kernels before and after may run at the same time (programmatic dependent launch).
        sweep: Tiles of slots that go through the weights together, so that those of one expert share reads.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    codes, high, zeros = halves_of(codes), halves_of(high), halves_of(zeros)
    tile, split = tl.program_id(0), tl.program_id(1)
    blocks_n = tl.cdiv(N, BLOCK_N)
    first_m = tile // (sweep * blocks_n) * sweep
    together = tl.minimum(tiles_m - first_m, sweep)
    tile_m = first_m + tile % (sweep * blocks_n) % together
    tile_n = tile % (sweep * blocks_n) // together
    expert = tl.load(tile_expert + tile_m)
    if expert < 0:
        return
    slot = tl.load(slots + tile_m * BLOCK_M + tl.arange(0, BLOCK_M))  # [BLOCK_M]
    there = slot < S
    rows = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    expert = expert.to(tl.int64)
    stride = tiles_n * 64
    x += tile_n * BLOCK_N // part_rows * part_stride
    # [BLOCK_N, BLOCK_M]
    acc = multiply_tile(
        x + (slot // share).to(tl.int64)[:, None] * x_stride, there, codes, high,
        scales + expert * groups * stride, zeros + expert * groups * stride,
        (expert * tiles_n + tile_n * (BLOCK_N // 64)) * atoms, rows, split, N, K, atoms, groups, stride, stride,
        BITS, GROUP, SYM, PROGRAM, True, MASK_K, SCALE_WEIGHTS, KEEP, False, UNROLL, SPLIT_K,
    )  # fmt: skip
    slot = slot.to(tl.int64)
    inside = (rows < N)[:, None] & there[None, :]
    offsets = slot[None, :] * N + rows[:, None]
    size = (tl.zeros((), tl.int64) + S) * N
    if ACTIVATION == "":
        tl.store(out + split * size + offsets, acc.to(out.dtype.element_ty), mask=inside)
    else:
        acc, last = sum_splits(acc, partials, counters, tile, split, size, offsets, inside, SPLIT_K)
        if last == 1:
            if HAS_BIAS:
                column = tl.load(columns + expert * stride + rows)  # [BLOCK_N]
                values = tl.load(bias + expert * bias_stride + column, mask=column < bias_stride, other=0.0)
                acc += values.to(tl.float32)[:, None]
            value = activate(acc, ACTIVATION, ALPHA, LIMIT, GATED)  # [WIDTH, BLOCK_M]
            WIDTH: tl.constexpr = value.shape[0]
            inner = tile_n * WIDTH + tl.arange(0, WIDTH)
            place = out + slot[None, :] * (N // (2 if GATED else 1)) + inner[:, None]
            tl.store(place, value.to(out.dtype.element_ty), mask=there[None, :])
