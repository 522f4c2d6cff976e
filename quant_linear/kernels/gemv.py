"""``x @ W.T`` for a single token: nothing passes through shared memory, and threads never wait for each other."""

from __future__ import annotations

import triton
import triton.language as tl

from graftq.quant_linear.kernels.epilogue import atoms_of_split, finish_row, load_scales, load_zeros
from graftq.quant_linear.kernels.unpack import halves_of, load_atoms, unpack_planes


@triton.jit
def _load_part(x, start, K, COUNT: tl.constexpr, MASK_K: tl.constexpr):
    """The elements ``start`` to ``start + COUNT - 1`` of ``x`` [K], 0 from ``K`` on: [COUNT].

    These are fewer elements than threads, so that the compiler lets each thread load what it needs itself.
    """
    k = start + tl.arange(0, COUNT)
    if MASK_K:
        return tl.load(x + k, mask=k < K, other=0.0)
    else:
        return tl.load(x + k)


@triton.jit
def multiply_row(
    x, codes, high, scales, zeros, first_atom, rows, split, N, K, atoms, scale_stride, zero_stride,
    BITS: tl.constexpr, GROUP: tl.constexpr, SYM: tl.constexpr, PROGRAM: tl.constexpr,
    MASK_K: tl.constexpr, AFTER_GATHER: tl.constexpr, UNROLL: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    """``W[rows] @ x`` over one split of K: float32 [BLOCK_N], not yet summed over the splits.

    The matrix units multiply, with eight copies of the token: on an H100 that takes fewer instructions than packed fp16
    multiply-adds, and sums in float32. Each plane of the words (:mod:`unpack`) is a product of its own: behind a join
    of planes, Triton would order the columns of the left operand differently where the right one has eight columns.
    The portable path multiplies in float32 without matrix units: theirs want 16 columns or more on other devices, and
    operands that pass through shared memory, which takes twice the instructions.

    Args:
        x: fp16 or bf16 [K], contiguous.
        codes, high: int16 pointers to the first atom of the whole tensor; see :func:`vector_kernel`.
        scales, zeros: Pointers to group 0 and output row 0 of the matrix, of zeros int16; see :func:`vector_kernel`.
        first_atom: Index of the atom of ``rows[0]`` and input row 0, int64.
        rows: Consecutive output rows, int32 [BLOCK_N], a multiple of 64.
        split: Which split of K.
        N, K, atoms: Sizes of the matrix, as in :func:`vector_kernel`.
        scale_stride, zero_stride: Elements from one group to the next.
        others: The constants of :func:`vector_kernel`.
    """
    BLOCK_N: tl.constexpr = rows.shape[0]
    DTYPE: tl.constexpr = x.dtype.element_ty
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    PLANES: tl.constexpr = 16 // WIDTH
    codes += first_atom * (512 * WIDTH)
    high += first_atom * 512

    begin, end = atoms_of_split(split, atoms, UNROLL, SPLIT_K)
    COLUMNS: tl.constexpr = 128 // PLANES if PROGRAM == "" else 8
    acc = tl.zeros((BLOCK_N, COLUMNS), tl.float32)
    zero = tl.full((BLOCK_N, 1), 2 ** (BITS - 1), DTYPE)
    if GROUP == 0 and not SYM:
        zero = load_zeros(zeros, 0, rows, zero_stride, N, DTYPE)[:, None]
    if AFTER_GATHER:
        tl.extra.cuda.gdc_wait()

    for step in range(begin, end, UNROLL):
        for unrolled in tl.static_range(UNROLL):
            atom = step + unrolled
            # [BLOCK_N, 8 * WIDTH], [BLOCK_N, 8]
            words, top = load_atoms(codes, high, atom, atoms, BLOCK_N, BITS, False)
            if GROUP != 0:
                group = atom // (GROUP // 128)
                scale = load_scales(scales, group, rows, scale_stride, N)[:, None]  # [BLOCK_N, 1]
                if not SYM:
                    zero = load_zeros(zeros, group, rows, zero_stride, N, DTYPE)[:, None]
            part = tl.zeros((BLOCK_N, COLUMNS), tl.float32)
            planes = unpack_planes(words, top, zero, BITS, PROGRAM, DTYPE)  # PLANES times [BLOCK_N, 128 / PLANES]
            for plane in tl.static_range(PLANES):
                values = _load_part(x, atom * 128 + plane * (128 // PLANES), K, 128 // PLANES, MASK_K)
                if PROGRAM == "":
                    part += planes[plane].to(tl.float32) * values.to(tl.float32)[None, :]
                else:
                    part = tl.dot(planes[plane], tl.broadcast_to(values[:, None], (128 // PLANES, 8)), part)
            if GROUP == 0:
                acc += part
            else:
                acc += part * scale
    if GROUP == 0:
        acc *= load_scales(scales, 0, rows, scale_stride, N)[:, None]
    if PROGRAM == "":
        return tl.sum(acc, 1)
    else:
        return tl.sum(acc, 1) / 8  # the eight columns are equal


@triton.jit
def vector_kernel(
    x, codes, high, scales, zeros, bias, out, partials, counters,
    N, K, atoms, scale_stride, zero_stride,
    BITS: tl.constexpr, GROUP: tl.constexpr, SYM: tl.constexpr, PROGRAM: tl.constexpr,
    HAS_BIAS: tl.constexpr, MASK_K: tl.constexpr, AFTER_GATHER: tl.constexpr,
    BLOCK_N: tl.constexpr, UNROLL: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_N elements of ``out = W @ x + bias``, or one split of their sums over K; grid (tiles of N, SPLIT_K).

    Args:
        x: fp16 or bf16 [K], in the packed order of the input rows.
        codes: int32 [tiles of 64 output rows, atoms, 256 * width], ``width`` bits a code (2 for 3-bit codes): the words
            of atoms of 64 output by 128 input rows, in the order that ``unpack.load_atoms`` describes.
        high: int32 [tiles of 64 output rows, atoms, 256], the top bits of 3-bit codes; read for 3 bits only.
        scales: [groups, N], any float dtype, rows ``scale_stride`` apart.
        zeros: int32 [groups, N / 2], the zero points, two of 16 bits in an element, rows ``zero_stride`` zero points
            apart; read if not SYM.
        bias: [N], any float dtype; read if HAS_BIAS.
        out: [N], in the dtype of ``x``.
        partials: float32 [SPLIT_K, N]; used if SPLIT_K > 1.
        counters: int32 [tiles of N], zero, and left zero; used if SPLIT_K > 1.
        N, K: Output rows, and input rows that ``x`` has.
        atoms: Atoms of 128 input rows.
        BITS: Code width: 2, 3, 4 or 8.
        GROUP: Input rows per group: 0 for one group in all, or a multiple of 128.
        SYM: Whether every zero point is ``2 ** (BITS - 1)``.
        PROGRAM: The text of ``unpack.unpack_program``, or "" for the portable path.
        MASK_K: Whether ``x`` ends before the last atom does.
        AFTER_GATHER: Whether the kernel that writes ``x`` may still be running (programmatic dependent launch).
        UNROLL: Atoms per step; divides ``atoms``.
    """
    codes, high, zeros = halves_of(codes), halves_of(high), halves_of(zeros)
    tile, split = tl.program_id(0), tl.program_id(1)
    rows = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    first_atom = (tile * (BLOCK_N // 64)).to(tl.int64) * atoms
    total = multiply_row(
        x, codes, high, scales, zeros, first_atom, rows, split, N, K, atoms, scale_stride, zero_stride,
        BITS, GROUP, SYM, PROGRAM, MASK_K, AFTER_GATHER, UNROLL, SPLIT_K,
    )  # fmt: skip
    finish_row(total, out, bias, partials, counters, tile, split, rows, N, HAS_BIAS, SPLIT_K)
