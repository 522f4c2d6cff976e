"""The products of experts on the matrix units: ``matrix_kernel`` with the tokens of one expert in each tile."""

from __future__ import annotations

import triton
import triton.language as tl

from graftq.quant_linear.kernels.activate import activate
from graftq.quant_linear.kernels.epilogue import sum_splits
from graftq.quant_linear.kernels.gemm import multiply_tile


@triton.jit
def experts_matrix_kernel(
    x, codes, high, scales, zeros, bias, columns, slots, tile_expert, out, partials, counters,
    S, N, K, atoms, groups, tiles_n, tiles_m, x_stride, share, part_rows, part_stride, bias_stride,
    BITS: tl.constexpr, GROUP: tl.constexpr, SYM: tl.constexpr, PROGRAM: tl.constexpr, HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, GATED: tl.constexpr,
    MASK_K: tl.constexpr, SCALE_WEIGHTS: tl.constexpr, KEEP: tl.constexpr, OVERLAP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, UNROLL: tl.constexpr, SPLIT_K: tl.constexpr, SWEEP: tl.constexpr,
):  # fmt: skip
    """A tile of one expert's rows and slots, or one split of its sum over K; grid (tiles, SPLIT_K).

    With an activation, ``out`` [S, N / 2] (ungated [S, N]) receives the activated sum of all splits; without one,
    ``out`` [SPLIT_K, S, N] receives each split's own sum, bare, for whoever reads it to add up.

    Args:
        x: fp16 or bf16 [S / share, parts, K], rows ``x_stride`` and parts ``part_stride`` apart.
        codes, high, scales, zeros: As in ``TiledExpertsLayout``; ``zeros`` int16, read if not SYM.
        bias: [experts, ``bias_stride``], any float dtype, by column; read if HAS_BIAS, which goes with an activation.
        columns: int32 [experts, 64 * tiles_n], the column of each row, beyond ``bias_stride`` for padding; likewise.
        slots, tile_expert: From ``prepare_kernel``.
        partials: float32 [SPLIT_K, S, N], if there are an activation and splits.
        counters: int32 [tiles], zero, likewise; left zero.
        N: Output rows, of 64 * ``tiles_n`` stored ones.
        tiles_m: Tiles of slots, used or not.
        part_rows: Rows that multiply the same part of ``x``.
        OVERLAP: Whether kernels before and after may run meanwhile (programmatic dependent launch).
        SWEEP: Tiles of slots that go through the weights together, so that those of one expert share reads.
        others: As in ``matrix_kernel``.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    tile, split = tl.program_id(0), tl.program_id(1)
    blocks_n = tl.cdiv(N, BLOCK_N)
    first_m = tile // (SWEEP * blocks_n) * SWEEP
    together = tl.minimum(tiles_m - first_m, SWEEP)
    tile_m = first_m + tile % (SWEEP * blocks_n) % together
    tile_n = tile % (SWEEP * blocks_n) // together
    expert = tl.load(tile_expert + tile_m)
    if expert < 0:
        return
    slot = tl.load(slots + tile_m * BLOCK_M + tl.arange(0, BLOCK_M))
    there = slot < S
    rows = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    expert = expert.to(tl.int64)
    stride = tiles_n * 64
    x += tile_n * BLOCK_N // part_rows * part_stride
    acc = multiply_tile(
        x + (slot // share).to(tl.int64)[:, None] * x_stride, there, codes, high,
        scales + expert * groups * stride, zeros + expert * groups * stride,
        (expert * tiles_n + tile_n * (BLOCK_N // 64)) * atoms, rows, split, N, K, atoms, groups, stride, stride,
        BITS, GROUP, SYM, 0, PROGRAM, True, MASK_K, SCALE_WEIGHTS, KEEP, False, UNROLL, SPLIT_K,
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
                column = tl.load(columns + expert * stride + rows)
                values = tl.load(bias + expert * bias_stride + column, mask=column < bias_stride, other=0.0)
                acc += values.to(tl.float32)[:, None]
            value = activate(acc, ACTIVATION, ALPHA, LIMIT, GATED)
            WIDTH: tl.constexpr = value.shape[0]
            inner = tile_n * WIDTH + tl.arange(0, WIDTH)
            place = out + slot[None, :] * (N // (2 if GATED else 1)) + inner[:, None]
            tl.store(place, value.to(out.dtype.element_ty), mask=there[None, :])
