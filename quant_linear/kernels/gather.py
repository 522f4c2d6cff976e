"""Gathering activations into the packed order of the input rows: what act-order costs."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gather_kernel(x, order, out, K, places, x_stride, BLOCK: tl.constexpr, BEFORE_DEPENDENT: tl.constexpr):
    """``out[m, place] = x[m, order[place]]``, 0 where ``order`` is not below ``K``; grid (M, blocks of places).

    Args:
        x: fp16 or bf16 [M, K], rows ``x_stride`` apart.
        order: int32 [places]: the input row at each place, ``K`` or more for padding.
        out: [M, places], contiguous, in the dtype of ``x``.
        places: Input rows as packed, a multiple of 128.
        BLOCK: Places that a program gathers.
        BEFORE_DEPENDENT: Whether the kernel that reads ``out`` may start before this one ends (programmatic dependent
            launch).
    """
    if BEFORE_DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    # [BLOCK]
    k = tl.load(order + place, mask=place < places, other=K)
    values = tl.load(x + token * x_stride + k, mask=k < K, other=0.0)
    tl.store(out + token * places + place, values, mask=place < places)
