"""What one quantized projection is: a frozen value that every layout and kernel is chosen by."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from functools import lru_cache

SUPPORTED_BITS = (2, 3, 4, 8)
"""Code widths of the GPTQ format, in bits."""


@dataclass(frozen=True)
class QuantSpec:
    """One GPTQ projection ``y = x @ W.T + bias`` with ``W`` of shape ``[out_features, in_features]``.

    The tensors it speaks of (source: AutoGPTQ's ``QuantLinear``; int32 words hold codes as a
    little-endian bit stream):

    ========== ======================================== =====================================
    tensor     shape                                    meaning
    ========== ======================================== =====================================
    qweight    int32 [packed_rows, padded_out]          codes, packed down ``in_features``
    qzeros     int32 [num_groups, ceil(padded_out*b/32)] zero points minus ``zero_offset``
    scales     float [num_groups, padded_out]           fp16, bf16 or fp32
    g_idx      int32 [in_features or padded_in]         group of each input row, may be absent
    bias       float [out_features]                     may be absent
    ========== ======================================== =====================================

    Attributes:
        bits: Code width, one of 2, 3, 4, 8.
        in_features: K, the model's own input width.
        out_features: N, the model's own output width.
        group_size: Input rows that share a scale; ``in_features`` when there is one group.
        num_groups: Rows of ``scales``.
        desc_act: True if ``g_idx`` is anything but ``arange(K) // group_size`` (act-order).
        sym: True if every zero point is ``2**(bits-1)``; kernels may then skip ``qzeros``.
        zero_offset: What is added to a stored zero point: 1 in ``gptq`` (v1), 0 in ``gptq_v2``.
            The sum is not masked, as in AutoGPTQ: a stored ``2**bits - 1`` means ``2**bits``.
        padded_in: K as stored; larger than ``in_features`` if the writer padded it.
        padded_out: N as stored; larger than ``out_features`` if the writer padded it.
        stored_g_idx: Length of ``g_idx`` as stored: ``in_features`` or ``padded_in``, 0 if absent.
        stored_bias: Length of ``bias`` as stored: ``out_features`` or ``padded_out``, 0 if absent.
        signature: All of these in one string, for operators. Every argument that an operator has besides is one more
            thing for ``torch.compile`` to check for every layer at every call.
    """

    bits: int
    in_features: int
    out_features: int
    group_size: int
    num_groups: int
    desc_act: bool
    sym: bool
    zero_offset: int
    padded_in: int
    padded_out: int
    stored_g_idx: int
    stored_bias: int
    signature: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Write the signature."""
        numbers = [str(int(getattr(self, each.name))) for each in fields(self) if each.init]
        object.__setattr__(self, "signature", ",".join(numbers))

    @staticmethod
    @lru_cache(maxsize=1024)
    def parse(signature: str) -> QuantSpec:
        """The spec that has this signature."""
        bits, k, n, group_size, num_groups, desc_act, sym, *rest = map(int, signature.split(","))
        return QuantSpec(bits, k, n, group_size, num_groups, bool(desc_act), bool(sym), *rest)

    @property
    def has_g_idx(self) -> bool:
        """Whether the checkpoint stores ``g_idx``."""
        return self.stored_g_idx > 0

    @property
    def has_bias(self) -> bool:
        """Whether the layer adds a bias."""
        return self.stored_bias > 0

    @property
    def packed_rows(self) -> int:
        """Rows of ``qweight``."""
        return math.ceil(self.padded_in * self.bits / 32)

    @property
    def packed_zero_columns(self) -> int:
        """Columns of ``qzeros``."""
        return math.ceil(self.padded_out * self.bits / 32)
