"""``x @ W.T`` for a single token: nothing passes through shared memory, no thread waits for another."""

from __future__ import annotations

import triton
import triton.language as tl

from graftq.quant_linear.kernels.epilogue import finish_row, load_scales, load_zeros
from graftq.quant_linear.kernels.unpack import load_words, unpack, unpack_planes


@triton.jit
def _load_part(x, start, K, COUNT: tl.constexpr, MASK_K: tl.constexpr):
    """The token's values at ``COUNT`` input rows: ``[COUNT, 8]``, the same eight times.

    Fewer elements than threads, so that the compiler lets every thread load those it needs itself.
    """
    k = start + tl.arange(0, COUNT)
    if MASK_K:
        values = tl.load(x + k, mask=k < K, other=0.0)
    else:
        values = tl.load(x + k)
    return tl.broadcast_to(values[:, None], (COUNT, 8))


@triton.jit
def multiply_row(
    x, codes, high, scales, zeros, first_atom, rows, split, N, K, atoms, scale_stride, zero_stride,
    BITS: tl.constexpr, GROUP: tl.constexpr, SYM: tl.constexpr, ZERO_OFFSET: tl.constexpr, PROGRAM: tl.constexpr,
    MASK_K: tl.constexpr, AFTER_GATHER: tl.constexpr, UNROLL: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    """Products of ``rows`` and the token ``x`` [K] over one split of K: float32 [rows].

    The matrix units do it, with eight copies of the token: on an H100 that takes fewer instructions than packed
    fp16 multiply-adds, and sums in float32. One product per plane, since Triton gives the left operand another order
    of columns behind a join where the right operand has eight columns.

    Args: As ``multiply_tile``.
    """
    BLOCK_N: tl.constexpr = rows.shape[0]
    DTYPE: tl.constexpr = x.dtype.element_ty
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    PLANES: tl.constexpr = 16 // WIDTH
    codes += first_atom * (512 * WIDTH)
    high += first_atom * 512

    per_split = tl.cdiv(atoms, SPLIT_K * UNROLL) * UNROLL
    begin = split * per_split
    end = tl.minimum(begin + per_split, atoms)
    acc = tl.zeros((BLOCK_N, 8), tl.float32)
    zero = tl.full((BLOCK_N, 1), 2 ** (BITS - 1), DTYPE)
    if GROUP == 0 and not SYM:
        zero = load_zeros(zeros, 0, rows, zero_stride, N, BITS, ZERO_OFFSET, DTYPE)[:, None]
    if AFTER_GATHER:
        tl.extra.cuda.gdc_wait()

    for step in range(begin, end, UNROLL):
        for unrolled in tl.static_range(UNROLL):
            atom = step + unrolled
            words = load_words(codes + atom * (512 * WIDTH), atoms * (512 * WIDTH), BLOCK_N, WIDTH, False)
            top = words
            if BITS == 3:
                top = load_words(high + atom * 512, atoms * 512, BLOCK_N, 1, False)
            if GROUP != 0:
                group = atom // (GROUP // 128)
                scale = load_scales(scales, group, rows, scale_stride, N)[:, None]
                if not SYM:
                    zero = load_zeros(zeros, group, rows, zero_stride, N, BITS, ZERO_OFFSET, DTYPE)[:, None]
            part = tl.zeros((BLOCK_N, 8), tl.float32)
            if PROGRAM == "":
                values = _load_part(x, atom * 128, K, 128, MASK_K)
                part = tl.dot(unpack(words, top, zero, BITS, PROGRAM, DTYPE), values, part)
            else:
                planes = unpack_planes(words, top, zero, BITS, PROGRAM, DTYPE)
                for plane in tl.static_range(PLANES):
                    values = _load_part(x, atom * 128 + plane * (128 // PLANES), K, 128 // PLANES, MASK_K)
                    part = tl.dot(planes[plane], values, part)
            if GROUP == 0:
                acc += part
            else:
                acc += part * scale
    if GROUP == 0:
        acc *= load_scales(scales, 0, rows, scale_stride, N)[:, None]
    return tl.sum(acc, 1) / 8  # eight equal columns


@triton.jit
def vector_kernel(
    x, codes, high, scales, zeros, bias, out, partials, counters,
    N, K, atoms, scale_stride, zero_stride,
    BITS: tl.constexpr, GROUP: tl.constexpr, SYM: tl.constexpr, ZERO_OFFSET: tl.constexpr, PROGRAM: tl.constexpr,
    HAS_BIAS: tl.constexpr, MASK_K: tl.constexpr, AFTER_GATHER: tl.constexpr,
    BLOCK_N: tl.constexpr, UNROLL: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    """``BLOCK_N`` elements of ``out`` [N], or one split of their sums over K; grid (tiles of N, SPLIT_K).

    Args: As ``matrix_kernel``, with ``GROUP`` 0 or a multiple of 128 and x [K].
    """
    tile, split = tl.program_id(0), tl.program_id(1)
    rows = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    first_atom = (tile * (BLOCK_N // 64)).to(tl.int64) * atoms
    total = multiply_row(
        x, codes, high, scales, zeros, first_atom, rows, split, N, K, atoms, scale_stride, zero_stride,
        BITS, GROUP, SYM, ZERO_OFFSET, PROGRAM, MASK_K, AFTER_GATHER, UNROLL, SPLIT_K,
    )  # fmt: skip
    finish_row(total, out, bias, partials, counters, tile, split, rows, N, HAS_BIAS, SPLIT_K)
