"""Dequantized weights of a run of output rows, for so many tokens that cuBLAS beats unpacking in the product."""

from __future__ import annotations

import triton
import triton.language as tl

from graftq.quant_linear.kernels.epilogue import load_scales, load_zeros, scale_weights
from graftq.quant_linear.kernels.unpack import halves_of, load_words, unpack


@triton.jit
def dequantize_kernel(
    codes, high, scales, zeros, out, first_tile, N, atoms, groups, scale_stride, zero_stride,
    BITS: tl.constexpr, GROUP: tl.constexpr, SYM: tl.constexpr, PROGRAM: tl.constexpr,
):  # fmt: skip
    """One atom of 64 output by 128 input rows as ``(code - zero) * scale``; grid (tiles of the run, atoms).

    Args:
        codes: int32 [tiles of 64 output rows, atoms, 256 * width], ``width`` bits a code (2 for 3-bit codes), each
            atom's words in the order that ``unpack.load_words`` describes.
        high: int32 [tiles of 64 output rows, atoms, 256], the top bits of 3-bit codes; read for 3 bits only.
        scales: [groups, N], any float dtype, rows ``scale_stride`` apart.
        zeros: int32 [groups, N / 2], the zero points, two of 16 bits in an element, rows ``zero_stride`` zero points
            apart; read if not SYM.
        out: fp16 or bf16 [64 * tiles of the run, 128 * atoms], contiguous, inputs in packed order; rows from ``N`` on
            become zero.
        first_tile: Where the run begins, in tiles of 64 output rows.
        N: Output rows of the whole matrix.
        atoms: Atoms of 128 input rows.
        groups: Rows of ``scales``.
        BITS: Code width: 2, 3, 4 or 8.
        GROUP: Input rows per group: 0 for one group in all, 16, 32, 64 or a multiple of 128.
        SYM: Whether every zero point is ``2 ** (BITS - 1)``.
        PROGRAM: The text of ``unpack.unpack_program``, or "" for the portable path.
    """
    codes, high, zeros = halves_of(codes), halves_of(high), halves_of(zeros)
    DTYPE: tl.constexpr = out.dtype.element_ty
    SCALES: tl.constexpr = scales.dtype.element_ty
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    tile, atom = tl.program_id(0), tl.program_id(1)
    rows = (first_tile + tile) * 64 + tl.arange(0, 64)
    here = (first_tile + tile).to(tl.int64) * atoms + atom
    words = load_words(codes + here * (512 * WIDTH), 0, 64, WIDTH, False)  # [64, 8 * WIDTH]
    top = words
    if BITS == 3:
        top = load_words(high + here * 512, 0, 64, 1, False)  # [64, 8]
    PER_ATOM: tl.constexpr = 128 // GROUP if GROUP > 0 and GROUP < 128 else 1
    # The groups of the atom: [1, PER_ATOM]
    if GROUP == 0:
        group = tl.zeros((1, 1), tl.int32)
    elif GROUP >= 128:
        group = tl.zeros((1, 1), tl.int32) + atom // (GROUP // 128)
    else:
        group = tl.minimum(atom * PER_ATOM + tl.arange(0, PER_ATOM), groups - 1)[None, :]
    zero = tl.full((64, 1), 2 ** (BITS - 1) if SYM else 0, DTYPE)
    weights = tl.reshape(unpack(words, top, zero, BITS, PROGRAM, DTYPE), (64, PER_ATOM, 128 // PER_ATOM))
    if not SYM:
        weights -= load_zeros(zeros, group, rows[:, None], zero_stride, N, DTYPE)[:, :, None]
    scale = load_scales(scales, group, rows[:, None], scale_stride, N)[:, :, None]  # [64, PER_ATOM, 1]
    weights = tl.reshape(scale_weights(weights, scale, SCALES), (64, 128))
    place = out + (tile * 64 + tl.arange(0, 64)).to(tl.int64)[:, None] * (atoms * 128) + atom * 128
    tl.store(place + tl.arange(0, 128)[None, :], weights)
