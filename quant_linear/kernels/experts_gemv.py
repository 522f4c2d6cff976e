"""The products of experts for a single token: each of its experts has programs of its own, and nothing is routed.

A *slot* is the token with one of its experts, numbered from 0 to TOP_K - 1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from graftq.quant_linear.kernels.activate import activate
from graftq.quant_linear.kernels.epilogue import sum_splits
from graftq.quant_linear.kernels.gemv import multiply_row
from graftq.quant_linear.kernels.unpack import halves_of


@triton.jit
def up_vector_kernel(
    x, index, codes, high, scales, zeros, bias, columns, out, partials, counters,
    experts, N, K, atoms, groups, tiles_n, x_stride, bias_stride,
    BITS: tl.constexpr, GROUP: tl.constexpr, SYM: tl.constexpr, PROGRAM: tl.constexpr, HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, GATED: tl.constexpr,
    MASK_K: tl.constexpr, AFTER_GATHER: tl.constexpr, OVERLAP: tl.constexpr,
    BLOCK_N: tl.constexpr, UNROLL: tl.constexpr, SPLIT_K: tl.constexpr, TOP_K: tl.constexpr,
):  # fmt: skip
    """``out[slot] = activate(up @ x[slot] + bias)`` by the slot's expert; grid (tiles of N, SPLIT_K, TOP_K).

    A program computes BLOCK_N output rows of one slot, or one split of their sums over K.

    Args:
        x: fp16 or bf16 [TOP_K, K], rows ``x_stride`` apart; a stride of 0 if all slots read the same row.
        index: Integers [TOP_K], the expert of each slot; for one that does not exist nothing is written.
        codes: int32 [experts, tiles_n, atoms, 256 * width], ``width`` bits a code (2 for 3-bit codes): the words of
            atoms of 64 output by 128 input rows, in the order that ``unpack.load_words`` describes.
        high: int32 [experts, tiles_n, atoms, 256], the top bits of 3-bit codes; read for 3 bits only.
        scales: [experts, groups, 64 * tiles_n], any float dtype.
        zeros: int32 [experts, groups, 32 * tiles_n], the zero points, two of 16 bits in an element; read if not SYM.
        bias: [experts, bias_stride], any float dtype, by column; read if HAS_BIAS.
        columns: int32 [experts, 64 * tiles_n], the column of each output row, ``bias_stride`` or more for padding; read
            if HAS_BIAS.
        out: In the dtype of ``x``, [TOP_K, N / 2] if the activation is gated, else [TOP_K, N].
        partials: float32 [SPLIT_K, TOP_K, N]; used if SPLIT_K > 1.
        counters: int32 [TOP_K * tiles of N], zero, and left zero; used if SPLIT_K > 1.
        experts: Experts of the layer.
        N, K: Output rows of an expert, and input rows that ``x`` has.
        atoms: Atoms of 128 input rows.
        groups: Rows of an expert's ``scales``.
        tiles_n: Tiles of 64 output rows of an expert.
        BITS, GROUP, SYM, PROGRAM, MASK_K, UNROLL: As in ``gemv.vector_kernel``.
        ACTIVATION, ALPHA, LIMIT, GATED: As in ``activate.activate``.
        AFTER_GATHER: Whether the kernel that writes ``x`` may still be running (programmatic dependent launch).
        OVERLAP: Whether the next kernel may start before this one ends, likewise.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    if AFTER_GATHER:
        tl.extra.cuda.gdc_wait()
    codes, high, zeros = halves_of(codes), halves_of(high), halves_of(zeros)
    tile, split, slot = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    expert = tl.load(index + slot).to(tl.int32)
    if (expert < 0) | (expert >= experts):
        return
    rows = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    expert = expert.to(tl.int64)
    stride = tiles_n * 64
    # [BLOCK_N]
    acc = multiply_row(
        x + slot * x_stride, codes, high, scales + expert * groups * stride, zeros + expert * groups * stride,
        (expert * tiles_n + tile * (BLOCK_N // 64)) * atoms, rows, split, N, K, atoms, stride, stride,
        BITS, GROUP, SYM, PROGRAM, MASK_K, False, UNROLL, SPLIT_K,
    )  # fmt: skip
    arrival = slot * tl.num_programs(0) + tile
    acc, last = sum_splits(acc, partials, counters, arrival, split, TOP_K * N, slot * N + rows, rows < N, SPLIT_K)
    if last == 1:
        if HAS_BIAS:
            column = tl.load(columns + expert * stride + rows)  # [BLOCK_N]
            acc += tl.load(bias + expert * bias_stride + column, mask=column < bias_stride, other=0.0).to(tl.float32)
        value = activate(acc, ACTIVATION, ALPHA, LIMIT, GATED)  # [WIDTH]
        WIDTH: tl.constexpr = value.shape[0]
        place = slot * (N // (2 if GATED else 1)) + tile * WIDTH + tl.arange(0, WIDTH)
        tl.store(out + place, value.to(out.dtype.element_ty))


@triton.jit
def down_vector_kernel(
    x, index, weights, codes, high, scales, zeros, bias, out, partials, counters,
    experts, N, K, atoms, groups, tiles_n, bias_stride,
    BITS: tl.constexpr, GROUP: tl.constexpr, SYM: tl.constexpr, PROGRAM: tl.constexpr, HAS_BIAS: tl.constexpr,
    AFTER_UP: tl.constexpr,
    BLOCK_N: tl.constexpr, UNROLL: tl.constexpr, SPLIT_K: tl.constexpr, TOP_K: tl.constexpr,
):  # fmt: skip
    """``out`` = the sum over slots of ``weights[slot] * (down @ x[slot] + bias)``; grid (tiles of N, SPLIT_K, TOP_K).

    A program computes BLOCK_N output rows of one slot, or one split of their sums over K. The last program of a tile to
    arrive adds up splits and slots, always in the same order.

    Args:
        x: fp16 or bf16 [TOP_K, K], contiguous; K is a multiple of 128.
        index: Integers [TOP_K], the expert of each slot; one that does not exist adds nothing.
        weights: [TOP_K], any float dtype: the router's weight of each slot.
        codes: int32 [experts, tiles_n, atoms, 256 * width], ``width`` bits a code (2 for 3-bit codes): the words of
            atoms of 64 output by 128 input rows, in the order that ``unpack.load_words`` describes.
        high: int32 [experts, tiles_n, atoms, 256], the top bits of 3-bit codes; read for 3 bits only.
        scales: [experts, groups, 64 * tiles_n], any float dtype.
        zeros: int32 [experts, groups, 32 * tiles_n], the zero points, two of 16 bits in an element; read if not SYM.
        bias: [experts, bias_stride], any float dtype; read if HAS_BIAS.
        out: [N], in the dtype of ``x``.
        partials: float32 [SPLIT_K, TOP_K, N].
        counters: int32 [tiles of N], zero, and left zero.
        experts, N, K, atoms, groups, tiles_n: As in :func:`up_vector_kernel`.
        BITS, GROUP, SYM, PROGRAM, UNROLL: As in ``gemv.vector_kernel``.
        AFTER_UP: Whether the kernel that writes ``x`` may still be running (programmatic dependent launch).
    """
    if AFTER_UP:
        tl.extra.cuda.gdc_wait()
    codes, high, zeros = halves_of(codes), halves_of(high), halves_of(zeros)
    tile, split, slot = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < N
    expert = tl.load(index + slot).to(tl.int32)
    stride = tiles_n * 64
    if (expert >= 0) & (expert < experts):
        place = expert.to(tl.int64)
        # [BLOCK_N]
        acc = multiply_row(
            x + slot * K, codes, high, scales + place * groups * stride, zeros + place * groups * stride,
            (place * tiles_n + tile * (BLOCK_N // 64)) * atoms, rows, split, N, K, atoms, stride, stride,
            BITS, GROUP, SYM, PROGRAM, False, False, UNROLL, SPLIT_K,
        )  # fmt: skip
        tl.store(partials + (split * TOP_K + slot) * N + rows, acc, mask=inside)
    tl.debug_barrier()  # all threads have stored their sums before one thread signals it
    if tl.atomic_add(counters + tile, 1, sem="acq_rel") == SPLIT_K * TOP_K - 1:
        total = tl.zeros((BLOCK_N,), tl.float32)
        for choice in tl.static_range(TOP_K):
            expert = tl.load(index + choice).to(tl.int32)
            there = inside & (expert >= 0) & (expert < experts)
            value = tl.zeros((BLOCK_N,), tl.float32)
            for part in tl.static_range(SPLIT_K):
                value += tl.load(partials + (part * TOP_K + choice) * N + rows, mask=there, other=0.0)
            if HAS_BIAS:
                place = bias + expert.to(tl.int64) * bias_stride + rows
                value += tl.load(place, mask=there, other=0.0).to(tl.float32)
            total += tl.where(there, value * tl.load(weights + choice).to(tl.float32), 0.0)
        tl.store(out + rows, total.to(out.dtype.element_ty), mask=inside)
        tl.store(counters + tile, 0)
