"""``x @ W.T`` on the matrix units straight from packed weights; the weights are the left operand, tokens the right.

A thread loads packed words, unpacks them (:mod:`unpack`) and passes them to the matrix instruction, without any
exchange with other threads; only the activations pass through shared memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from graftq.quant_linear.kernels.epilogue import atoms_of_split, finish_tile, load_scales, load_zeros, scale_weights
from graftq.quant_linear.kernels.launch import VARIABLE
from graftq.quant_linear.kernels.unpack import halves_of, load_atoms, unpack


@triton.jit
def _await_product(acc, PROGRAM: tl.constexpr):
    """``acc``, once the matrix unit has finished with it.

    This is an empty use of ``acc``. Without one, Triton 3.6 lets Hopper's asynchronous products of one step run on
    into the next, which overwrites the registers of their left operand: sums were wrong in some launches on an H100,
    and never with it.
    """
    if PROGRAM == "":
        return acc
    else:
        return tl.inline_asm_elementwise("", "=r,0", [acc], tl.float32, True, 1)


@triton.jit
def multiply_tile(
    x, inside_m, codes, high, scales, zeros,
    first_atom, rows, split, N, K, atoms, groups, scale_stride, zero_stride,
    BITS: tl.constexpr, GROUP: tl.constexpr, SYM: tl.constexpr, PROGRAM: tl.constexpr,
    MASK_M: tl.constexpr, MASK_K: tl.constexpr, SCALE_WEIGHTS: tl.constexpr, KEEP: tl.constexpr,
    AFTER_GATHER: tl.constexpr, UNROLL: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    """``W[rows] @ x.T`` over one split of K: float32 [BLOCK_N, BLOCK_M], not yet summed over the splits.

    Args:
        x: Pointers to the first activation of each token, fp16 or bf16 [BLOCK_M, 1].
        inside_m: Whether each token exists, [BLOCK_M]; read if MASK_M or MASK_K.
        codes, high: int16 pointers to the first atom of the whole tensor; see :func:`matrix_kernel`.
        scales, zeros: Pointers to group 0 and output row 0 of the matrix, of zeros int16; see :func:`matrix_kernel`.
        first_atom: Index of the atom of ``rows[0]`` and input row 0, int64.
        rows: Consecutive output rows, int32 [BLOCK_N], a multiple of 64.
        split: Which split of K.
        N, K, atoms, groups: Sizes of the matrix, as in :func:`matrix_kernel`.
        scale_stride, zero_stride: Elements from one group to the next.
        others: The constants of :func:`matrix_kernel`.
    """
    BLOCK_N: tl.constexpr = rows.shape[0]
    BLOCK_M: tl.constexpr = inside_m.shape[0]
    DTYPE: tl.constexpr = x.dtype.element_ty
    SCALES: tl.constexpr = scales.dtype.element_ty
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    codes += first_atom * (512 * WIDTH)
    high += first_atom * 512
    columns = tl.arange(0, 128)
    x += columns[None, :]  # [BLOCK_M, 128]

    begin, end = atoms_of_split(split, atoms, UNROLL, SPLIT_K)
    PER_ATOM: tl.constexpr = 128 // GROUP if GROUP > 0 else 1
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    zero = tl.full((BLOCK_N, 1), 2 ** (BITS - 1) if SYM else 0, DTYPE)
    if GROUP == 0 and not SYM:
        zero = load_zeros(zeros, 0, rows, zero_stride, N, DTYPE)[:, None]
    if AFTER_GATHER:
        tl.extra.cuda.gdc_wait()

    for step in range(begin, end, UNROLL):
        for unrolled in tl.static_range(UNROLL):
            atom = step + unrolled
            # [BLOCK_N, 8 * WIDTH], [BLOCK_N, 8]
            words, top = load_atoms(codes, high, atom, atoms, BLOCK_N, BITS, KEEP)
            # [128, BLOCK_M]
            if MASK_M or MASK_K:
                inside = inside_m[:, None]
                if MASK_K:
                    inside &= (atom * 128 + columns < K)[None, :]
                activations = tl.trans(tl.load(x + atom * 128, mask=inside, other=0.0))
            else:
                activations = tl.trans(tl.load(x + atom * 128))
            if GROUP == 0:
                weights = unpack(words, top, zero, BITS, PROGRAM, DTYPE)  # [BLOCK_N, 128]
                acc = _await_product(tl.dot(weights, activations, acc), PROGRAM)
            elif GROUP >= 128:
                group = atom // (GROUP // 128)
                scale = load_scales(scales, group, rows, scale_stride, N)[:, None]  # [BLOCK_N, 1]
                if not SYM:
                    zero = load_zeros(zeros, group, rows, zero_stride, N, DTYPE)[:, None]
                weights = unpack(words, top, zero, BITS, PROGRAM, DTYPE)  # [BLOCK_N, 128]
                if SCALE_WEIGHTS:
                    acc = _await_product(tl.dot(scale_weights(weights, scale, SCALES), activations, acc), PROGRAM)
                else:
                    acc += tl.dot(weights, activations) * scale
            else:
                # The last atom may reach beyond the last group; its codes there meet activations that are zero.
                group = tl.minimum(atom * PER_ATOM + tl.arange(0, PER_ATOM), groups - 1)[None, :]  # [1, PER_ATOM]
                scale = load_scales(scales, group, rows[:, None], scale_stride, N)[:, :, None]  # [BLOCK_N, PER_ATOM, 1]
                weights = tl.reshape(unpack(words, top, zero, BITS, PROGRAM, DTYPE), (BLOCK_N, PER_ATOM, GROUP))
                if not SYM:
                    # [BLOCK_N, PER_ATOM]
                    center = load_zeros(zeros, group, rows[:, None], zero_stride, N, DTYPE)
                    weights -= center[:, :, None]
                weights = tl.reshape(scale_weights(weights, scale, SCALES), (BLOCK_N, 128))
                acc = _await_product(tl.dot(weights, activations, acc), PROGRAM)
    if GROUP == 0:
        acc *= load_scales(scales, 0, rows, scale_stride, N)[:, None]
    return acc


@triton.jit(do_not_specialize=VARIABLE)
def matrix_kernel(
    x, codes, high, scales, zeros, bias, out, partials, counters,
    M, N, K, atoms, groups, x_stride, scale_stride, zero_stride,
    BITS: tl.constexpr, GROUP: tl.constexpr, SYM: tl.constexpr, PROGRAM: tl.constexpr,
    HAS_BIAS: tl.constexpr, MASK_M: tl.constexpr, MASK_K: tl.constexpr, SCALE_WEIGHTS: tl.constexpr, KEEP: tl.constexpr,
    AFTER_GATHER: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, UNROLL: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    """``out = x @ W.T + bias``; grid (tiles of N times tiles of M, SPLIT_K).

    A program computes BLOCK_N output rows for BLOCK_M tokens, or one split of their sums over K.

    Args:
        x: fp16 or bf16 [M, K], rows ``x_stride`` apart, in the packed order of the input rows.
        codes: int32 [tiles of 64 output rows, atoms, 256 * width], ``width`` bits a code (2 for 3-bit codes): the words
            of atoms of 64 output by 128 input rows, in the order that ``unpack.load_atoms`` describes.
        high: int32 [tiles of 64 output rows, atoms, 256], the top bits of 3-bit codes; read for 3 bits only.
        scales: [groups, N], any float dtype, rows ``scale_stride`` apart.
        zeros: int32 [groups, N / 2], the zero points, two of 16 bits in an element, rows ``zero_stride`` zero points
            apart; read if not SYM.
        bias: [N], any float dtype; read if HAS_BIAS.
        out: [M, N], contiguous, in the dtype of ``x``.
        partials: float32 [SPLIT_K, M, N]; used if SPLIT_K > 1.
        counters: int32 [tiles of N times tiles of M], zero, and left zero; used if SPLIT_K > 1.
        M, N, K: Tokens, output rows, and input rows that ``x`` has.
        atoms: Atoms of 128 input rows.
        groups: Rows of ``scales``.
        BITS: Code width: 2, 3, 4 or 8.
        GROUP: Input rows per group: 0 for one group in all, 16, 32, 64 or a multiple of 128.
        SYM: Whether every zero point is ``2 ** (BITS - 1)``.
        PROGRAM: The text of ``unpack.unpack_program``, or "" for the portable path.
        MASK_M: Whether the last tile has fewer tokens than the others. (Reading one token in place of each missing one
            would need no mask, but all programs reading the same cache line costs far more.)
        MASK_K: Whether ``x`` ends before the last atom does.
        SCALE_WEIGHTS: Whether the weights are scaled, not the products; ignored for groups shorter than an atom, whose
            weights always are.
        KEEP: Whether other tiles read the same weights.
        AFTER_GATHER: Whether the kernel that writes ``x`` may still be running (programmatic dependent launch).
        UNROLL: Atoms per step; divides ``atoms``.
    """
    codes, high, zeros = halves_of(codes), halves_of(high), halves_of(zeros)
    tile, split = tl.program_id(0), tl.program_id(1)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tile_n, tile_m = tile // tiles_m, tile % tiles_m
    rows = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    first_atom = (tile_n * (BLOCK_N // 64)).to(tl.int64) * atoms
    acc = multiply_tile(
        x + tokens.to(tl.int64)[:, None] * x_stride, tokens < M, codes, high, scales, zeros,
        first_atom, rows, split, N, K, atoms, groups, scale_stride, zero_stride,
        BITS, GROUP, SYM, PROGRAM, MASK_M, MASK_K, SCALE_WEIGHTS, KEEP, AFTER_GATHER, UNROLL, SPLIT_K,
    )  # fmt: skip
    finish_tile(acc, out, bias, partials, counters, tile, split, rows, tokens, M, N, HAS_BIAS, SPLIT_K)
