"""``x @ W.T`` for a single token: nothing passes through shared memory, no thread waits for another."""

from __future__ import annotations

import triton
import triton.language as tl

from graftq.quant_linear.kernels.tile import finish_tile, load_scales, load_zeros
from graftq.quant_linear.kernels.unpack import load_words, unpack, unpack_planes


@triton.jit
def _load_part(x, order, start, K, COUNT: tl.constexpr, ORDERED: tl.constexpr, MASK_K: tl.constexpr):
    """The token's values at ``COUNT`` sorted input rows: ``[COUNT, 8]``, the same eight times.

    Fewer elements than threads, so that the compiler lets every thread load what it needs itself.
    """
    k = start + tl.arange(0, COUNT)
    if ORDERED:
        k = tl.load(order + k)
        values = tl.load(x + k, mask=k < K, other=0.0)
    elif MASK_K:
        values = tl.load(x + k, mask=k < K, other=0.0)
    else:
        values = tl.load(x + k)
    return tl.broadcast_to(values[:, None], (COUNT, 8))


@triton.jit
def vector_kernel(
    x, order, codes, high, scales, zeros, bias, out, partials, counters,
    N, K, atoms, scale_stride, zero_stride,
    BITS: tl.constexpr, GROUP: tl.constexpr, SYM: tl.constexpr, ZERO_OFFSET: tl.constexpr, PROGRAM: tl.constexpr,
    HAS_BIAS: tl.constexpr, MASK_K: tl.constexpr, ORDERED: tl.constexpr,
    BLOCK_N: tl.constexpr, UNROLL: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = x.dtype.element_ty
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    PLANES: tl.constexpr = 16 // WIDTH
    tile, split = tl.program_id(0), tl.program_id(1)
    rows = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    first_atom = (tile * (BLOCK_N // 64)).to(tl.int64) * atoms
    codes += first_atom * (512 * WIDTH)
    high += first_atom * 512

    per_split = tl.cdiv(atoms, SPLIT_K * UNROLL) * UNROLL
    begin = split * per_split
    end = tl.minimum(begin + per_split, atoms)
    acc = tl.zeros((BLOCK_N, 8), tl.float32)
    zero = tl.full((BLOCK_N, 1), 2 ** (BITS - 1), DTYPE)
    if GROUP == 0 and not SYM:
        zero = load_zeros(zeros, 0, rows, zero_stride, N, BITS, ZERO_OFFSET, DTYPE)[:, None]

    for step in range(begin, end, UNROLL):
        for unrolled in tl.static_range(UNROLL):
            atom = step + unrolled
            words = load_words(codes + atom * (512 * WIDTH), atoms * (512 * WIDTH), BLOCK_N, WIDTH)
            top = words
            if BITS == 3:
                top = load_words(high + atom * 512, atoms * 512, BLOCK_N, 1)
            if GROUP != 0:
                group = atom // (GROUP // 128)
                scale = load_scales(scales, group, rows, scale_stride, N)[:, None]
                if not SYM:
                    zero = load_zeros(zeros, group, rows, zero_stride, N, BITS, ZERO_OFFSET, DTYPE)[:, None]
            part = tl.zeros((BLOCK_N, 8), tl.float32)
            if PROGRAM == "":
                values = _load_part(x, order, atom * 128, K, 128, ORDERED, MASK_K)
                part = tl.dot(unpack(words, top, zero, BITS, PROGRAM, DTYPE), values, part)
            else:
                planes = unpack_planes(words, top, zero, BITS, PROGRAM, DTYPE)
                for plane in tl.static_range(PLANES):
                    start = atom * 128 + plane * (128 // PLANES)
                    values = _load_part(x, order, start, K, 128 // PLANES, ORDERED, MASK_K)
                    part = tl.dot(planes[plane], values, part)
            if GROUP == 0:
                acc += part
            else:
                acc += part * scale
    if GROUP == 0:
        acc *= load_scales(scales, 0, rows, scale_stride, N)[:, None]
    finish_tile(acc, out, bias, partials, counters, tile, split, rows, tl.arange(0, 8), 1, N, HAS_BIAS, SPLIT_K)
