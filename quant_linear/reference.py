"""The ``torch`` provider: any device, any dtype, any configuration, and the truth the others are held to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import pluggy
import torch

from graftq.quant_linear.layouts import CheckpointLayout, Layout
from graftq.quant_linear.packing import dequantize
from graftq.quant_linear.selection import Accepted, KernelProvider, Request, Verdict
from graftq.quant_linear.spec import QuantSpec


class TorchProvider:
    """Dequantises in float32 at every call and multiplies in the activations' dtype."""

    name = "torch"
    priority = 0

    def judge(self, request: Request) -> Verdict:
        """Accept everything."""
        return Accepted()

    def layout(self, spec: QuantSpec) -> Layout:
        """The checkpoint's own."""
        return CheckpointLayout(spec)

    def linear(self, x: torch.Tensor, packed: Mapping[str, torch.Tensor], spec: QuantSpec) -> torch.Tensor:
        """``x @ W.T + bias``; ``x`` [..., in_features] in any float dtype, returns [..., out_features] in the same."""
        tensors = self.layout(spec).unpack(packed)
        bias = None if tensors.bias is None else tensors.bias[: spec.out_features].to(x.dtype)
        return torch.nn.functional.linear(x, dequantize(tensors, spec).to(x.dtype), bias)


@pluggy.HookimplMarker("graftq")
def graftq_kernels() -> Iterable[KernelProvider]:
    """Register the reference."""
    return [TorchProvider()]
