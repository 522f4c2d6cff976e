"""A run of output rows as plain weights, for products so large that cuBLAS on them beats unpacking in the product."""

from __future__ import annotations

import triton
import triton.language as tl

from graftq.quant_linear.kernels.epilogue import load_scales, load_zeros, scale_weights
from graftq.quant_linear.kernels.unpack import load_words, unpack


@triton.jit
def dequantize_kernel(
    codes, high, scales, zeros, out, first_tile, N, atoms, groups, scale_stride, zero_stride,
    BITS: tl.constexpr, GROUP: tl.constexpr, SYM: tl.constexpr, ZERO_OFFSET: tl.constexpr, PROGRAM: tl.constexpr,
):  # fmt: skip
    """One atom as ``(code - zero) * scale`` to ``out``; grid (tiles of the run, atoms).

    Args:
        codes, high, scales, zeros, groups, GROUP, PROGRAM: As in ``matrix_kernel``.
        out: fp16 or bf16 [64 * tiles of the run, 128 * atoms]; rows from ``N`` on become zero.
        first_tile: Where the run begins, in tiles of 64 output rows.
    """
    DTYPE: tl.constexpr = out.dtype.element_ty
    SCALES: tl.constexpr = scales.dtype.element_ty
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    tile, atom = tl.program_id(0), tl.program_id(1)
    rows = (first_tile + tile) * 64 + tl.arange(0, 64)
    here = (first_tile + tile).to(tl.int64) * atoms + atom
    words = load_words(codes + here * (512 * WIDTH), 0, 64, WIDTH, False)
    top = words
    if BITS == 3:
        top = load_words(high + here * 512, 0, 64, 1, False)
    PER_ATOM: tl.constexpr = 128 // GROUP if GROUP > 0 and GROUP < 128 else 1
    if GROUP == 0:
        group = tl.zeros((1, 1), tl.int32)
    elif GROUP >= 128:
        group = tl.zeros((1, 1), tl.int32) + atom // (GROUP // 128)
    else:
        group = tl.minimum(atom * PER_ATOM + tl.arange(0, PER_ATOM), groups - 1)[None, :]
    zero = tl.full((64, 1), 2 ** (BITS - 1) if SYM else 0, DTYPE)
    weights = tl.reshape(unpack(words, top, zero, BITS, PROGRAM, DTYPE), (64, PER_ATOM, 128 // PER_ATOM))
    if not SYM:
        weights -= load_zeros(zeros, group, rows[:, None], zero_stride, N, BITS, ZERO_OFFSET, DTYPE)[:, :, None]
    scale = load_scales(scales, group, rows[:, None], scale_stride, N)[:, :, None]
    weights = tl.reshape(scale_weights(weights, scale, SCALES), (64, 128))
    place = out + (tile * 64 + tl.arange(0, 64)).to(tl.int64)[:, None] * (atoms * 128) + atom * 128
    tl.store(place + tl.arange(0, 128)[None, :], weights)
