"""The last step of an experts layer for several tokens: the weighted sum over each token's experts."""

from __future__ import annotations

import triton
import triton.language as tl

from graftq.quant_linear.kernels.launch import VARIABLE


@triton.jit(do_not_specialize=VARIABLE)
def weighted_sum_kernel(
    rows, index, weights, bias, out, S, N, experts, bias_stride,
    HAS_BIAS: tl.constexpr, OVERLAP: tl.constexpr, BLOCK: tl.constexpr, SPLIT_K: tl.constexpr, TOP_K: tl.constexpr,
):  # fmt: skip
    """``out[t]`` = sum over j of ``weights[t, j] * (rows[t, j] + bias[index[t, j]])``; grid (tokens, blocks of N).

    Splits and experts are added up in float32 and in a fixed order.

    Args:
        rows: [SPLIT_K, S, N], any float dtype: each split's sum of the second product; S is tokens times TOP_K.
        index: Integers [S]: the expert of each slot. One that does not exist adds nothing, and its ``rows`` are not
            read.
        weights: [S], any float dtype: the router's weight of each slot.
        bias: [experts, bias_stride], any float dtype; read if HAS_BIAS.
        out: fp16 or bf16 [tokens, N].
        experts: Experts of the layer.
        OVERLAP: Whether the kernel that writes ``rows`` may still be running (programmatic dependent launch).
        BLOCK: Columns of N that a program sums.
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
            value += tl.load(rows + place * N + columns, mask=there, other=0.0).to(tl.float32)  # [BLOCK]
        if HAS_BIAS:
            value += tl.load(bias + expert.to(tl.int64) * bias_stride + columns, mask=there, other=0.0).to(tl.float32)
        total += tl.where(there, value * tl.load(weights + slot).to(tl.float32), 0.0)
    tl.store(out + token.to(tl.int64) * N + columns, total.to(out.dtype.element_ty), mask=inside)
