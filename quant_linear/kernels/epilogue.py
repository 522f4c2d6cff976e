"""What the tile programs have in common: scales, zero points, and the end of a tile."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_scales(scales, group, rows, stride, N):
    """float32 scales of ``rows`` in ``group`` (broadcast against each other); 0 for rows beyond ``N``."""
    return tl.load(scales + group * stride + rows, mask=rows < N, other=0.0).to(tl.float32)


@triton.jit
def load_zeros(zeros, group, rows, stride, N, BITS: tl.constexpr, ZERO_OFFSET: tl.constexpr, DTYPE: tl.constexpr):
    """Zero points of ``rows`` in ``group`` (broadcast against each other), in ``DTYPE``.

    int32 ones are read as the checkpoint packs them, a little-endian bit stream along the rows; int16 ones, those of
    experts, are what they say.
    """
    if zeros.dtype.element_ty == tl.int16:
        return tl.load(zeros + group * stride + rows, mask=rows < N, other=0).to(DTYPE)
    else:
        word = zeros + group * stride + rows * BITS // 32
        shift = rows * BITS % 32
        zero = tl.load(word, mask=rows < N, other=0) >> shift
        if BITS == 3:  # codes 10 and 21 of every 32 straddle two words
            left = 32 - tl.maximum(shift, 1)  # bits of the first word; the shift above filled in copies of the sign
            rest = tl.load(word + 1, mask=(rows < N) & (shift > 29), other=0)
            zero = (zero & ((1 << left) - 1)) | (rest << left)
        return ((zero & ((1 << BITS) - 1)) + ZERO_OFFSET).to(DTYPE)


@triton.jit
def scale_weights(weights, scale, SCALES: tl.constexpr):
    """``weights * scale`` in the dtype of ``weights``; ``scale`` float32, broadcast, stored as ``SCALES``.

    The multiplication of packed halves has one rounding, like any other. But a scale stored in a wider dtype than
    float16 may lie outside its range though the weight does not; then the product is taken in float32.
    """
    if weights.dtype == tl.float16 and not SCALES.is_fp16():
        return (weights.to(tl.float32) * scale).to(weights.dtype)
    else:
        return weights * scale.to(weights.dtype)


@triton.jit
def sum_splits(acc, partials, counters, tile, split, size, offsets, inside, SPLIT_K: tl.constexpr):
    """The sum of ``acc`` over the splits of K, and 1 for the program that has it, which is the last to arrive.

    Each split leaves its partial sums in ``partials`` [SPLIT_K, size]; the last one to arrive at ``counters[tile]``
    adds them up, always from split 0 on, so that the result does not depend on the order of arrival, and sets the
    counter back to zero for the next launch. Others get 0 for the second value, and nothing of use for the first.
    """
    last = 1
    if SPLIT_K > 1:
        tl.store(partials + split * size + offsets, acc, mask=inside)
        tl.debug_barrier()  # every thread's partial sums before the one thread's signal
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
    """Store a tile ``acc`` float32 ``[rows, tokens]``, after summing the splits of K (:func:`sum_splits`)."""
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
    """:func:`finish_tile` for a single token: ``acc`` float32 ``[rows]``."""
    inside = rows < N
    acc, last = sum_splits(acc, partials, counters, tile, split, N, rows, inside, SPLIT_K)
    if last == 1:
        if HAS_BIAS:
            acc += tl.load(bias + rows, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + rows, acc.to(out.dtype.element_ty), mask=inside)
