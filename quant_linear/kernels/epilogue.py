"""Parts of several kernels: loading scales and zero points, summing the splits of K, storing a tile."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_scales(scales, group, rows, stride, N):
    """The scales of output ``rows`` in each ``group``, float32; 0 for rows from ``N`` on.

    Args:
        scales: [groups, N], any float dtype, rows ``stride`` apart.
        group, rows: Integers, broadcast against each other; the result has their shape.
    """
    return tl.load(scales + group * stride + rows, mask=rows < N, other=0.0).to(tl.float32)


@triton.jit
def load_zeros(zeros, group, rows, stride, N, DTYPE: tl.constexpr):
    """The zero points of output ``rows`` in each ``group``, in ``DTYPE``.

    They are not read as the checkpoint packs them: shifting each out of its word made Triton pass whole tiles of
    unpacked weights through shared memory.

    Args:
        zeros: int16 [groups, N], rows ``stride`` apart.
        group, rows: Integers, broadcast against each other; the result has their shape.
    """
    return tl.load(zeros + group * stride + rows, mask=rows < N, other=0).to(DTYPE)


@triton.jit
def scale_weights(weights, scale, SCALES: tl.constexpr):
    """``weights * scale``, rounded once, in the dtype of ``weights``.

    A scale stored in a wider dtype than float16 may lie outside float16's range though the weight does not. So the
    multiplication is then done in float32.

    Args:
        weights: fp16 or bf16, of any shape.
        scale: float32, broadcast against ``weights``.
        SCALES: The dtype that the scales are stored in.
    """
    if weights.dtype == tl.float16 and not SCALES.is_fp16():
        return (weights.to(tl.float32) * scale).to(weights.dtype)
    else:
        return weights * scale.to(weights.dtype)


@triton.jit
def atoms_of_split(split, atoms, UNROLL: tl.constexpr, SPLIT_K: tl.constexpr):
    """The first of the atoms that a split of K sums, and the one behind its last; whole steps of UNROLL atoms."""
    per_split = tl.cdiv(atoms, SPLIT_K * UNROLL) * UNROLL
    begin = split * per_split
    return begin, tl.minimum(begin + per_split, atoms)


@triton.jit
def sum_splits(acc, partials, counters, tile, split, size, offsets, inside, SPLIT_K: tl.constexpr):
    """The sum of ``acc`` over the splits of K, and 1, for the last program of a tile to arrive; the others get 0.

    Each split stores its partial sums. The last one to arrive adds them up, always from split 0 on, so that the result
    does not depend on the order of arrival, and sets the counter back to zero for the next launch. What the others get
    as a sum is undefined.

    Args:
        acc: float32 of any shape, one split's sums.
        partials: float32 [SPLIT_K, size].
        counters: int32 [tiles], zero between launches.
        tile, split: Which tile and split ``acc`` belongs to.
        size: Elements of all tiles of one split.
        offsets: Where the elements of ``acc`` go within ``size``, integers in its shape.
        inside: Which elements of ``acc`` exist, in its shape.
    """
    last = 1
    if SPLIT_K > 1:
        tl.store(partials + split * size + offsets, acc, mask=inside)
        tl.debug_barrier()  # all threads have stored their sums before one thread signals it
        last = tl.atomic_add(counters + tile, 1, sem="acq_rel") // (SPLIT_K - 1)
        if last == 1:
            acc = tl.zeros_like(acc)
            if acc.numel <= 2048:  # all loads in flight at once, where registers allow
                for other in tl.static_range(SPLIT_K):
                    acc += tl.load(partials + other * size + offsets, mask=inside, other=0.0)
            else:
                for other in range(SPLIT_K):
                    acc += tl.load(partials + other * size + offsets, mask=inside, other=0.0)
            tl.store(counters + tile, 0)
    return acc, last


@triton.jit
def finish_tile(
    acc, out, bias, partials, counters, tile, split, rows, tokens, M, N, HAS_BIAS: tl.constexpr, SPLIT_K: tl.constexpr
):
    """Sum the splits of K (:func:`sum_splits`), add the bias, and store a tile of ``out`` [M, N].

    Args:
        acc: float32 [BLOCK_N, BLOCK_M], one split's sums.
        bias: [N], read if HAS_BIAS.
        partials: float32 [SPLIT_K, M, N].
        rows, tokens: Integers [BLOCK_N] and [BLOCK_M]: what ``acc`` holds of N and M.
        others: As for :func:`sum_splits`.
    """
    inside = (rows < N)[:, None] & (tokens < M)[None, :]
    offsets = tokens.to(tl.int64)[None, :] * N + rows[:, None]
    size = (tl.zeros((), tl.int64) + M) * N
    acc, last = sum_splits(acc, partials, counters, tile, split, size, offsets, inside, SPLIT_K)
    if last == 1:
        if HAS_BIAS:
            acc += tl.load(bias + rows, mask=rows < N, other=0.0).to(tl.float32)[:, None]
        tl.store(out + offsets, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def finish_row(acc, out, bias, partials, counters, tile, split, rows, N, HAS_BIAS: tl.constexpr, SPLIT_K: tl.constexpr):
    """:func:`finish_tile` for a single token: ``acc`` float32 [BLOCK_N], ``out`` [N], ``partials`` [SPLIT_K, N]."""
    inside = rows < N
    acc, last = sum_splits(acc, partials, counters, tile, split, N, rows, inside, SPLIT_K)
    if last == 1:
        if HAS_BIAS:
            acc += tl.load(bias + rows, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + rows, acc.to(out.dtype.element_ty), mask=inside)
