"""The end of an experts layer for several tokens: splits, biases and choices added up in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def weighted_sum_kernel(
    rows, index, weights, bias, out, S, N, experts, bias_stride,
    HAS_BIAS: tl.constexpr, OVERLAP: tl.constexpr, BLOCK: tl.constexpr, SPLIT_K: tl.constexpr, TOP_K: tl.constexpr,
):  # fmt: skip
    """``out[t] = sum over j of weights[t, j] * (rows[t, j] + bias[index[t, j]])``; grid (tokens, blocks of N).

    Args:
        rows: Any float dtype [SPLIT_K, S, N], to be summed over the splits; S is tokens times TOP_K.
        index: Integers [S]; nobody's slots add nothing, and their rows may hold anything.
        weights: [S], any float dtype.
        bias: [experts, ``bias_stride``], any float dtype.
        out: [tokens, N].
    """
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < N
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in tl.static_range(TOP_K):
        slot = token * TOP_K + choice
        expert = tl.load(index + slot).to(tl.int32)
        there = inside & (expert >= 0) & (expert < experts)
        value = tl.zeros((BLOCK,), tl.float32)
        for split in tl.static_range(SPLIT_K):
            place = (tl.zeros((), tl.int64) + split) * S + slot
            value += tl.load(rows + place * N + columns, mask=there, other=0.0).to(tl.float32)
        if HAS_BIAS:
            value += tl.load(bias + expert.to(tl.int64) * bias_stride + columns, mask=there, other=0.0).to(tl.float32)
        total += tl.where(there, value * tl.load(weights + slot).to(tl.float32), 0.0)
    tl.store(out + token.to(tl.int64) * N + columns, total.to(out.dtype.element_ty), mask=inside)
