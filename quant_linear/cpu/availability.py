"""What dense layers and experts on a CPU have in common: which activations, which layout, which arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from graftq.quant_linear.cpu.dequantized_matmul import CpuWeights
from graftq.quant_linear.cpu.kernels import int4_block, takes_bytes
from graftq.quant_linear.cpu.layout import CpuLayout, Int4Layout, Int8Layout
from graftq.quant_linear.selection import Accepted, Rejected, Request, Verdict
from graftq.quant_linear.spec import QuantSpec

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def judge_cpu(request: Request[Any]) -> Verdict:
    """Accept activations on a CPU in a dtype that models come in."""
    if request.device != "cpu":
        return Rejected(f"it is for CPUs, not for device type {request.device}")
    if request.dtype not in DTYPES:
        return Rejected(f"{request.dtype} activations", "load the model with dtype=torch.bfloat16")
    if request.dtype == torch.float16:
        return Accepted(
            note="float16 has bfloat16's accuracy on CPUs, as torch's kernels compute; dtype=torch.float32 "
            "computes exactly, and a token takes many times as long"
        )
    return Accepted()


def layout_of(spec: QuantSpec) -> CpuLayout:
    """As this machine's kernel wants it; without one, as tiles are unpacked fastest."""
    return Int8Layout(spec) if takes_bytes(spec) else Int4Layout(spec, int4_block() or 64)


def weights_of(
    packed: Mapping[str, torch.Tensor | None], spec: QuantSpec, names: Sequence[str] = CpuWeights._fields[:7]
) -> CpuWeights:
    """The arguments of the operators; ``names`` are those that the tensors have in ``packed``, if they are there."""
    arguments: list[Any] = [*map(packed.get, names), spec.bits, spec.sym, spec.zero_offset]
    return CpuWeights(*arguments)
