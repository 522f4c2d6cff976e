"""Random weights as a checkpoint stores them, for layers of any size."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from graftq.quant_linear.layouts import GptqTensors
from graftq.quant_linear.spec import QuantSpec

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Weights:
    """How they are quantized; ``group`` -1 for one group."""

    bits: int = 4
    group: int = 128
    act_order: bool = False

    def __str__(self) -> str:
        return f"{self.bits}-bit g{self.group}{' act-order' if self.act_order else ''}"


def spec_of(k: int, n: int, weights: Weights) -> QuantSpec:
    group = k if weights.group == -1 else weights.group
    return QuantSpec(
        bits=weights.bits, in_features=k, out_features=n, group_size=group, num_groups=k // group,
        desc_act=weights.act_order, sym=True, zero_offset=1, padded_in=k, padded_out=n,
        stored_g_idx=k if weights.act_order else 0, stored_bias=0,
    )  # fmt: skip


def random_tensors(spec: QuantSpec, g_idx: torch.Tensor | None) -> GptqTensors:
    """Any bits are valid codes; centered, so that routing and sums behave."""
    zero = 2 ** (spec.bits - 1) - 1
    stream = sum(zero << shift for shift in range(0, 32 * spec.bits, spec.bits))
    words = [(stream >> (32 * word) & 0xFFFFFFFF) for word in range(spec.bits)]
    words = [word - 2**32 if word >= 2**31 else word for word in words]
    zeros = torch.tensor(words, dtype=torch.int32, device=DEVICE).repeat(spec.packed_zero_columns // spec.bits)
    size = (spec.packed_rows, spec.out_features)
    scales = (torch.rand(spec.num_groups, spec.out_features, device=DEVICE) + 0.5) * 2 ** (4 - spec.bits) / 256
    return GptqTensors(
        torch.randint(-(2**31), 2**31, size, device=DEVICE, dtype=torch.int64).to(torch.int32),
        zeros.expand(spec.num_groups, -1).contiguous(),
        scales.half(),
        g_idx,
    )
