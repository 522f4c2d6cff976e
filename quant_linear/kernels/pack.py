"""From the checkpoint's bit stream to the words that the other kernels read, in one launch while a model loads."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _code(qweight, row, column, words, stride, BITS: tl.constexpr):
    """The codes at ``row`` (any shape; beyond the stored ones 0) and ``column`` (likewise; -1 is 0): uint32."""
    is_stored = (row < (words + BITS - 1) // BITS * 32) & (column >= 0)
    bit = tl.where(is_stored, row, 0) * BITS
    word, shift = bit // 32, bit % 32
    place = qweight + word.to(tl.int64) * stride + column
    code = tl.load(place, mask=is_stored & (word < words), other=0).to(tl.uint32, bitcast=True) >> shift.to(tl.uint32)
    if 32 % BITS:  # a code may straddle two words
        is_cut = shift + BITS > 32
        rest = tl.load(place + stride, mask=is_stored & is_cut & (word + 1 < words), other=0)
        code |= rest.to(tl.uint32, bitcast=True) << tl.where(is_cut, 32 - shift, 0).to(tl.uint32)
    return code & ((1 << BITS) - 1)


@triton.jit
def pack_kernel(qweight, order, source, codes, high, words, stride, BITS: tl.constexpr):
    """One atom of 64 output by 128 input rows; grid (tiles of 64 output rows, atoms).

    Args:
        qweight: int32 [words, columns], rows ``stride`` apart: codes as the checkpoint stores them, a stream of bits
            down each column.
        order: int32 [128 * atoms], the stored input row at each place; beyond the stored ones for padding.
        source: int64 [64 * tiles], the stored column of each output row; -1 for padding.
        codes: int16 [tiles, atoms, 512 * width], written; ``width`` bits a code (2 for 3-bit codes), each atom's words
            in the order that ``unpack.load_words`` describes.
        high: int16 [tiles, atoms, 512], written for 3 bits only: the top bits.
        words: Rows of ``qweight``.
        stride: Elements from one of them to the next.
        BITS: Code width: 2, 3, 4 or 8.
    """
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    PLANES: tl.constexpr = 16 // WIDTH
    tile, atom = tl.program_id(0), tl.program_id(1)
    here = tile.to(tl.int64) * tl.num_programs(1) + atom
    # From the most significant to the least, the bits of a word's number are: 16 columns, tile of 16 output rows, row
    # of 8, column pair, 8 columns, half of the tile, column of the pair.
    at = tl.arange(0, 512 * WIDTH)
    row = at // 256 % 4 * 16 + at // 2 % 2 * 8 + at // 32 % 8
    place = at // 1024 * 16 + at // 4 % 2 * 8 + at // 8 % 4 * 2 + at % 2
    column = tl.load(source + tile * 64 + row)
    word = tl.zeros((512 * WIDTH,), tl.uint32)
    for plane in tl.static_range(PLANES):
        input_row = tl.load(order + atom * 128 + plane * (128 // PLANES) + place)
        code = _code(qweight, input_row, column, words, stride, BITS)
        word |= (code & ((1 << WIDTH) - 1)) << (plane * WIDTH)
    tl.store(codes + here * (512 * WIDTH) + at, word.to(tl.int32, bitcast=True).to(tl.int16))
    if BITS == 3:  # the order of the top bits' words is that of the codes' without the number of the 8 columns
        at = tl.arange(0, 512)
        row = at // 128 * 16 + at // 2 % 2 * 8 + at // 16 % 8
        place = at // 4 % 4 * 2 + at % 2
        column = tl.load(source + tile * 64 + row)
        top = tl.zeros((512,), tl.uint32)
        for half in tl.static_range(2):
            for plane in tl.static_range(8):
                input_row = tl.load(order + atom * 128 + plane * 16 + half * 8 + place)
                code = _code(qweight, input_row, column, words, stride, BITS)
                top |= (code >> 2) << (plane // 2 * 4 + 2 + plane % 2 - 2 * half)
        tl.store(high + here * 512 + at, top.to(tl.int32, bitcast=True).to(tl.int16))
