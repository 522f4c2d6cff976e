"""Packed words to ``code - zero point`` in the activation dtype; every kernel that reads weights uses this.

Words have 16 bits. A word of ``b`` bits per code holds ``P = 16 // b`` codes ("planes"), and one atom of 128 input
rows by 64 output rows is ``[64, W]`` words with ``W = 128 // P``: plane ``j`` of word ``i`` is input row ``W * j + i``.
3-bit codes are stored as 2-bit words (their low two bits) and 1-bit words (their top bit). Tensors are int32, two words
in an element (:func:`halves_of`).

No integer is converted to a float: a code ORed into the mantissa of ``2**e`` gives the float ``2**e + code`` if the
code's lowest bit falls on the mantissa bit that is worth 1. Subtracting ``2**e + zero`` is then exact. Two codes share
a 32-bit register, so that a code costs about one instruction (``lop3`` and a subtraction per pair).
"""

from __future__ import annotations

import struct
from functools import cache

import triton
import triton.language as tl

_AND_OR = "0xEA"  # lop3 truth table of (a & b) | c


def _pair(value: int) -> str:
    """The same 16 bits in both halves of a register."""
    return f"0x{value:04x}{value:04x}"


def _half_bits(value: int) -> int:
    """fp16 bits of an integer that fp16 holds exactly."""
    return struct.unpack("<H", struct.pack("<e", float(value)))[0]


def _bfloat_bits(value: int) -> int:
    """bf16 bits of an integer that bf16 holds exactly."""
    return struct.unpack("<I", struct.pack("<f", float(value)))[0] >> 16


@cache
def unpack_program(bits: int, dtype: str, zero: int | None) -> str:
    """PTX for ``tl.inline_asm_elementwise``: from two words to two elements of each plane.

    Every register holds a pair. Operands: one output register per plane; then the words; the zero points in the
    activation dtype (read if ``zero`` is None); and for 3 bits the top-bit words and the shifts, both from
    :func:`_spread_top_bits`.

    Args:
        bits: Code width.
        dtype: Triton's name of the activation dtype, "fp16" or "bf16".
        zero: The zero point of every code, or None if it is an operand.
    """
    planes = 16 // (2 if bits == 3 else bits)
    word, zero_operand, high, shift = (f"${planes + operand}" for operand in range(4))
    half = dtype == "fp16"
    float_bits = _half_bits if half else _bfloat_bits
    mantissa = 10 if half else 7
    lines: list[str] = []
    declared: dict[str, None] = {}

    def emit(register: str, text: str) -> str:
        if register not in declared:
            declared[register] = None
            lines.append(text)
        return register

    def shifted(source: str, name: str, by: int) -> str:
        return source if by == 0 else emit(f"{name}{by}", f"shr.u32 {name}{by}, {source}, {by};")

    def minus(base: int) -> str:
        """Register holding ``-(base + zero)`` in both halves."""
        register = f"c{base}"
        if zero is not None:
            return emit(register, f"mov.b32 {register}, {_pair(float_bits(-(base + zero)))};")
        minus_one = emit("m1", f"mov.b32 m1, {_pair(float_bits(-1))};")
        constant = emit(f"b{base}", f"mov.b32 b{base}, {_pair(float_bits(-base))};")
        return emit(register, f"fma.rn.{kind} {register}, {zero_operand}, {minus_one}, {constant};")

    kind = "f16x2" if half else "bf16x2"
    one = emit("one", f"mov.b32 one, {_pair(float_bits(1))};")

    if bits == 8 and not half:  # eight bits do not fit bf16's mantissa: so nibbles, then high * 16 + (low - zero)
        sixteen = emit("k16", f"mov.b32 k16, {_pair(float_bits(16))};")
        top = emit("t128", f"mov.b32 t128, {_pair(float_bits(-128))};")
        less = minus(0)  # 128 + zero may need nine bits, so the two are subtracted one after the other
        magic = _pair(float_bits(128))
        for plane in range(2):
            low, upper = shifted(word, "w", 8 * plane), shifted(word, "w", 8 * plane + 4)
            for name, source in (("l", low), ("u", upper)):
                emit(f"{name}{plane}", f"lop3.b32 {name}{plane}, {source}, {_pair(15)}, {magic}, {_AND_OR};")
            lines.append(f"fma.rn.{kind} l{plane}, l{plane}, {one}, {top};")
            lines.append(f"fma.rn.{kind} l{plane}, l{plane}, {one}, {less};")
            lines.append(f"fma.rn.{kind} u{plane}, u{plane}, {one}, {top};")
            lines.append(f"fma.rn.{kind} ${plane}, u{plane}, {sixteen}, l{plane};")
        return _scoped(declared, lines)

    if bits == 3:  # first into nibbles: planes 0, 2, 4, 6 of one register, planes 1, 3, 5, 7 of the other
        lines.append(f"and.b32 h, {shift}, 31; shl.b32 h, {high}, h;")
        declared["h"] = None
        nibbles = []
        for odd in range(2):
            top = emit(f"top{odd}", f"and.b32 top{odd}, {shifted('h', 'h', odd)}, {_pair(0x4444)};")
            low = shifted(word, "w", 2 * odd)
            nibbles.append(emit(f"n{odd}", f"lop3.b32 n{odd}, {low}, {_pair(0x3333)}, {top}, {_AND_OR};"))
    for plane in range(planes):
        source, name, position = word, "w", plane * bits
        if bits == 3:
            source, name, position = nibbles[plane % 2], f"n{plane % 2}_", plane // 2 * 4
        offset = position % 8  # bit of this plane after the shift by whole bytes
        extra = offset if offset + bits > mantissa else 0
        place = offset - extra
        base = (1 << mantissa) >> place
        mask = _pair(((1 << bits) - 1) << place)
        moved = shifted(source, name, position - place)
        emit(f"q{plane}", f"lop3.b32 q{plane}, {moved}, {mask}, {_pair(float_bits(base))}, {_AND_OR};")
        lines.append(f"fma.rn.{kind} ${plane}, q{plane}, {one}, {minus(base)};")
    return _scoped(declared, lines)


def _scoped(declared: dict[str, None], lines: list[str]) -> str:
    return "{ .reg .b32 " + ", ".join(declared) + "; " + " ".join(lines) + " }"


@triton.jit
def _stack(first, second):
    """Two tensors [R, W] side by side, [R, 2 W]; no data moves between threads."""
    both = tl.permute(tl.join(first, second), (0, 2, 1))  # [R, W, which] to [R, which, W]
    return tl.reshape(both, (first.shape[0], 2 * first.shape[1]))


@triton.jit
def halves_of(tensor):
    """A pointer to int32 as one to int16, the lower half of each first.

    Kernels work with 16-bit words and zero points, but tensors are int32: NCCL, which copies models from GPU to GPU,
    has no int16.
    """
    return tensor.to(tl.pointer_type(tl.int16), bitcast=True)


@triton.jit
def load_words(pointer, atom_stride, BLOCK_N: tl.constexpr, BITS: tl.constexpr, KEEP: tl.constexpr):
    """The words of one atom per 64 output rows: int16 ``[BLOCK_N, 8 * BITS]``.

    Memory holds them in the order in which the matrix instructions want their left operand (``mma`` m16k16 with
    four warps down the rows). Let ``n0`` to ``n5`` be the bits of the output row within the atom, and ``i0`` to ``i5``
    those of the word's column. From the lowest bit, the offset of a word is ``i0 n3 i3 | i1 i2 n0 n1 n2 | n4 n5 |
    i4 i5``: 16 bytes of one thread, the lane, the warp, repetitions. One-bit words have no ``i3``. So the reshapes and
    the permutation below only rename axes, and no data moves between threads.

    Args:
        pointer: To the atom of the first 64 rows, int16 [512 * BITS].
        atom_stride: Words from an atom to that of the next 64 rows.
        BLOCK_N: Output rows, a multiple of 64.
        BITS: Bits per code in these words: 1, 2, 4 or 8.
        KEEP: Whether another program will read the atom soon. If not, it is marked to be evicted first, so that it does
            not push the activations out of the caches (8 % at one token on an H100).
    """
    POLICY: tl.constexpr = "" if KEEP else "evict_first"
    TILES: tl.constexpr = BLOCK_N // 64
    if BITS == 1:
        offsets = tl.arange(0, TILES)[:, None] * atom_stride + tl.arange(0, 512)[None, :]
        # [atom of 64 rows, n5 n4, n2 n1 n0, i2 i1, n3, i0]
        words = tl.reshape(tl.load(pointer + offsets, eviction_policy=POLICY), (TILES, 4, 8, 4, 2, 2))
        # to [atom, n5 n4, n3, n2 n1 n0, i2 i1, i0]
        return tl.reshape(tl.permute(words, (0, 1, 4, 2, 3, 5)), (BLOCK_N, 8))
    else:
        REPEAT: tl.constexpr = BITS // 2
        rows = tl.arange(0, TILES)[None, :, None] * atom_stride
        offsets = tl.arange(0, REPEAT)[:, None, None] * 1024 + rows + tl.arange(0, 1024)[None, None, :]
        # [i5 i4, atom of 64 rows, n5 n4, n2 n1 n0, i2 i1, i3, n3, i0]
        words = tl.reshape(tl.load(pointer + offsets, eviction_policy=POLICY), (REPEAT, TILES, 4, 8, 4, 2, 2, 2))
        # to [atom, n5 n4, n3, n2 n1 n0, i5 i4, i3, i2 i1, i0]
        return tl.reshape(tl.permute(words, (1, 2, 6, 3, 0, 5, 4, 7)), (BLOCK_N, 8 * BITS))


@triton.jit
def load_atoms(codes, high, atom, atoms, BLOCK_N: tl.constexpr, BITS: tl.constexpr, KEEP: tl.constexpr):
    """The words of one atom per 64 output rows, as :func:`unpack` takes them: int16 [BLOCK_N, W] and [BLOCK_N, 8].

    Args:
        codes, high: int16 pointers to the first atom of the first 64 rows; ``high`` is read for 3 bits only.
        atom: Which atom along the input rows.
        atoms: Atoms from 64 output rows to the next.
        BLOCK_N, KEEP: As in :func:`load_words`.
        BITS: Code width: 2, 3, 4 or 8.
    """
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    words = load_words(codes + atom * (512 * WIDTH), atoms * (512 * WIDTH), BLOCK_N, WIDTH, KEEP)
    top = words
    if BITS == 3:
        top = load_words(high + atom * 512, atoms * 512, BLOCK_N, 1, KEEP)
    return words, top


@triton.jit
def _spread_top_bits(high):
    """One-bit words [R, 8] repeated to [R, 16], one for each 2-bit word, and the left shift [1, 16] of each.

    After the shift, the top bit of plane ``2 e + odd`` is bit ``4 e + 2 + odd``. :func:`unpack_program` moves the even
    planes of a 2-bit word into the nibbles of one register, and the odd planes into those of another. There the top
    bit belongs right above the two low bits; for the odd planes that takes another shift, to the right by one.
    """
    both = tl.reshape(tl.broadcast_to(high[:, None, :], (high.shape[0], 2, 8)), (high.shape[0], 16))
    return both, (tl.arange(0, 16) // 8 * 2).to(tl.int16)[None, :]


@triton.jit
def _two_planes(words, top, shift, zero, FIRST: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Planes FIRST and FIRST + 1 of :func:`unpack_planes` by shifts, masks and a conversion, for any device.

    Args:
        words: int32 [R, W].
        top, shift: For 3 bits, from :func:`_spread_top_bits`, int32; else anything.
        zero, BITS, DTYPE: As in :func:`unpack`.
    """
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    even = (words >> (FIRST * WIDTH)) & ((1 << WIDTH) - 1)
    odd = (words >> (FIRST * WIDTH + WIDTH)) & ((1 << WIDTH) - 1)
    if BITS == 3:
        moved = (top << shift) >> (FIRST * 2)
        even |= moved & 4
        odd |= (moved >> 1) & 4
    return even.to(DTYPE) - zero, odd.to(DTYPE) - zero


@triton.jit
def _portable_planes(words, high, zero, BITS: tl.constexpr, DTYPE: tl.constexpr):
    words = words.to(tl.int32)
    top, shift = words, words
    if BITS == 3:
        both, left = _spread_top_bits(high)
        top, shift = both.to(tl.int32), left.to(tl.int32)
    planes = _two_planes(words, top, shift, zero, 0, BITS, DTYPE)
    if BITS != 8:
        planes = planes + _two_planes(words, top, shift, zero, 2, BITS, DTYPE)
    if BITS < 4:
        planes = planes + _two_planes(words, top, shift, zero, 4, BITS, DTYPE)
        planes = planes + _two_planes(words, top, shift, zero, 6, BITS, DTYPE)
    return planes


@triton.jit
def unpack_planes(words, high, zero, BITS: tl.constexpr, PROGRAM: tl.constexpr, DTYPE: tl.constexpr):
    """``code - zero``, one tensor ``[R, W]`` per plane; arguments as :func:`unpack`."""
    if PROGRAM == "":
        return _portable_planes(words, high, zero, BITS, DTYPE)
    else:
        D = DTYPE.value
        if BITS == 8:
            return tl.inline_asm_elementwise(PROGRAM, "=r,=r,r,r", [words, zero], (D, D), True, 2)
        elif BITS == 4:
            return tl.inline_asm_elementwise(PROGRAM, "=r,=r,=r,=r,r,r", [words, zero], (D, D, D, D), True, 2)
        elif BITS == 3:
            top, shift = _spread_top_bits(high)
            text: tl.constexpr = "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r"
            args = [words, zero, top, shift]
            return tl.inline_asm_elementwise(PROGRAM, text, args, (D, D, D, D, D, D, D, D), True, 2)
        else:
            constraints: tl.constexpr = "=r,=r,=r,=r,=r,=r,=r,=r,r,r"
            return tl.inline_asm_elementwise(PROGRAM, constraints, [words, zero], (D, D, D, D, D, D, D, D), True, 2)


@triton.jit
def unpack(words, high, zero, BITS: tl.constexpr, PROGRAM: tl.constexpr, DTYPE: tl.constexpr):
    """``code - zero`` for 128 input rows: ``[R, 128]`` in ``DTYPE``, exact.

    Args:
        words: int16 ``[R, W]``, the low two bits for 3-bit codes.
        high: int16 ``[R, 8]``, the top bits of 3-bit codes; for other widths any tensor.
        zero: Zero points in ``DTYPE``, ``[R, 1]``.
        BITS: Code width.
        PROGRAM: :func:`unpack_program`'s text, or "" for the portable path, which needs no inline assembly.
        DTYPE: float16 or bfloat16.
    """
    p = unpack_planes(words, high, zero, BITS, PROGRAM, DTYPE)
    if BITS == 8:
        return _stack(p[0], p[1])
    elif BITS == 4:
        return _stack(_stack(p[0], p[1]), _stack(p[2], p[3]))
    else:
        low = _stack(_stack(p[0], p[1]), _stack(p[2], p[3]))
        return _stack(low, _stack(_stack(p[4], p[5]), _stack(p[6], p[7])))
