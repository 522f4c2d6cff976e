"""The activations of ``activations.Activation`` inside a kernel, in float32."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _formula(x, NAME: tl.constexpr):
    if NAME == "silu":
        return x * tl.sigmoid(x)
    elif NAME == "gelu":
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":  # (1 + tanh(u)) / 2 is sigmoid(2 u)
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        tl.static_assert(NAME == "relu" or NAME == "relu2")
        positive = tl.where(x < 0, 0.0, x)  # unlike a maximum, lets NaN through
        return positive * positive if NAME == "relu2" else positive


@triton.jit
def _halves(acc):
    """Gate and up values, [rows / 2] or [rows / 2, tokens] each, out of rows that alternate by eights."""
    ROWS: tl.constexpr = acc.shape[0]
    # Views [16 rows, gate or up, row of 8(, token)], permuted so that gate or up comes last, where `split` takes it.
    if len(acc.shape) == 1:
        gate, up = tl.split(tl.permute(tl.reshape(acc, (ROWS // 16, 2, 8)), (0, 2, 1)))
        return tl.reshape(gate, (ROWS // 2,)), tl.reshape(up, (ROWS // 2,))
    else:
        TOKENS: tl.constexpr = acc.shape[1]
        gate, up = tl.split(tl.permute(tl.reshape(acc, (ROWS // 16, 2, 8, TOKENS)), (0, 2, 3, 1)))
        return tl.reshape(gate, (ROWS // 2, TOKENS)), tl.reshape(up, (ROWS // 2, TOKENS))


@triton.jit
def activate(acc, NAME: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, GATED: tl.constexpr):
    """The activation of a product: float32 [rows] or [rows, tokens], half as many rows if it is gated.

    Args:
        acc: float32 [rows] or [rows, tokens]. If gated, each 16 rows are 8 of gate, then the same 8 of up. One thread
            holds rows i and i + 8 of a matrix instruction's result, so that no data moves between threads.
        NAME, ALPHA, LIMIT: As in ``activations.Activation``.
        GATED: Whether there are gate rows.
    """
    if not GATED:
        return _formula(acc, NAME)
    else:
        gate, up = _halves(acc)
        if NAME == "swiglu_oai":
            gate = tl.where(gate > LIMIT, LIMIT, gate)
            up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
            return (up + 1) * gate * tl.sigmoid(ALPHA * gate)
        else:
            return _formula(gate, NAME) * up
