"""``x @ W.T`` on the matrix units straight from packed weights: the weights left, the tokens right."""

from __future__ import annotations

import triton
import triton.language as tl

from graftq.quant_linear.kernels.tile import finish_tile, load_scales, load_zeros
from graftq.quant_linear.kernels.unpack import load_words, unpack


@triton.jit
def _load_tokens(x, tokens, start, stride, M, K, MASK_K: tl.constexpr):
    """Activations of 128 input rows from ``start``: ``[128, BLOCK_M]``."""
    k = start + tl.arange(0, 128)
    inside = (tokens < M)[:, None]
    if MASK_K:
        inside = inside & (k < K)[None, :]
    return tl.trans(tl.load(x + tokens.to(tl.int64)[:, None] * stride + k[None, :], mask=inside, other=0.0))


@triton.jit
def linear_kernel(
    x, codes, high, scales, zeros, bias, out, partials, counters,
    M, N, K, atoms, x_stride, scale_stride, zero_stride,
    BITS: tl.constexpr, GROUP: tl.constexpr, SYM: tl.constexpr, ZERO_OFFSET: tl.constexpr, PROGRAM: tl.constexpr,
    HAS_BIAS: tl.constexpr, MASK_K: tl.constexpr, SCALE_WEIGHTS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, UNROLL: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = x.dtype.element_ty
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    tile, split = tl.program_id(0), tl.program_id(1)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tile_n, tile_m = tile // tiles_m, tile % tiles_m
    rows = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    first_atom = (tile_n * (BLOCK_N // 64)).to(tl.int64) * atoms
    codes += first_atom * (512 * WIDTH)
    high += first_atom * 512

    per_split = tl.cdiv(atoms, SPLIT_K * UNROLL) * UNROLL
    begin = split * per_split
    end = tl.minimum(begin + per_split, atoms)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
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
            acts = _load_tokens(x, tokens, atom * 128, x_stride, M, K, MASK_K)
            if GROUP == 0:
                acc = tl.dot(unpack(words, top, zero, BITS, PROGRAM, DTYPE), acts, acc)
            elif GROUP >= 128:
                group = atom // (GROUP // 128)
                if not SYM:
                    zero = load_zeros(zeros, group, rows, zero_stride, N, BITS, ZERO_OFFSET, DTYPE)[:, None]
                scale = load_scales(scales, group, rows, scale_stride, N)[:, None]
                weights = unpack(words, top, zero, BITS, PROGRAM, DTYPE)
                if SCALE_WEIGHTS:
                    acc = tl.dot(weights * scale.to(DTYPE), acts, acc)
                else:
                    acc += tl.dot(weights, acts) * scale
            else:
                GROUPS: tl.constexpr = 128 // GROUP
                group = (atom * GROUPS + tl.arange(0, GROUPS))[None, :]
                scale = load_scales(scales, group, rows[:, None], scale_stride, N).to(DTYPE)
                weights = unpack(words, top, zero if SYM else 0.0, BITS, PROGRAM, DTYPE)
                acc = tl.dot(weights, acts, acc)
    if GROUP == 0:
        acc *= load_scales(scales, 0, rows, scale_stride, N)[:, None]
    finish_tile(acc, out, bias, partials, counters, tile, split, rows, tokens, M, N, HAS_BIAS, SPLIT_K)
