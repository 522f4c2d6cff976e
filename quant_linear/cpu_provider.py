"""The ``cpu`` provider: every dense GPTQ configuration on a CPU, by the kernels that torch brings along."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import pluggy
import torch

from graftq.quant_linear.cpu_kernels import int4_block, takes_bytes
from graftq.quant_linear.cpu_layout import CpuLayout, Int4Layout, Int8Layout
from graftq.quant_linear.cpu_ops import CpuLinear
from graftq.quant_linear.cpu_tiles import Weights
from graftq.quant_linear.selection import (
    Accepted,
    ExpertsProvider,
    ExpertsRequest,
    KernelProvider,
    Rejected,
    Request,
    Verdict,
)
from graftq.quant_linear.spec import QuantSpec

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def layout_of(spec: QuantSpec) -> CpuLayout:
    """As this machine's kernel wants it; without one, as tiles are unpacked fastest."""
    return Int8Layout(spec) if takes_bytes(spec) else Int4Layout(spec, int4_block() or 64)


def weights_of(packed: Mapping[str, torch.Tensor], spec: QuantSpec) -> Weights:
    """The arguments of the operators."""
    return Weights(
        packed["codes"],
        packed["scales_and_zeros"],
        packed["groups"],
        packed["scales"],
        packed["qzeros"],
        packed.get("order"),
        packed.get("bias"),
        spec.bits,
        spec.sym,
        spec.zero_offset,
    )


def judge_cpu(request: Request | ExpertsRequest) -> Verdict:
    """Accept activations on a CPU in a dtype that models come in."""
    if request.device != "cpu":
        return Rejected(f"it is for CPUs, not for device type {request.device}")
    if request.dtype not in DTYPES:
        return Rejected(f"{request.dtype} activations", "load the model with dtype=torch.bfloat16")
    return Accepted()


class CpuProvider:
    """Rearranges the weights once (:class:`CpuLayout`), and multiplies straight from them.

    bf16 and fp16 models compute in bf16 with float32 sums (relative error below 1e-2), float32 ones in float32.
    """

    name = "cpu"
    priority = 50

    def judge(self, request: Request) -> Verdict:
        """Accept every projection on a CPU."""
        return judge_cpu(request)

    def layout(self, spec: QuantSpec) -> CpuLayout:
        """Nibbles or bytes in the order of this machine's kernel."""
        return layout_of(spec)

    def linear(self, x: torch.Tensor, packed: Mapping[str, torch.Tensor], spec: QuantSpec) -> torch.Tensor:
        """``x @ W.T + bias``; ``x`` [..., in_features], any strides; returns [..., out_features].

        Differentiable in ``x``. Raises RuntimeError for a last dimension that is not ``in_features``.
        """
        if torch.is_autocast_enabled("cpu"):  # as for any other linear layer: operators next to it rely on it
            x = x.to(torch.get_autocast_dtype("cpu"))
        rows = x if x.dim() == 2 else x.reshape(-1, spec.in_features)
        if rows.shape[1] != spec.in_features:
            raise RuntimeError(f"an input of width {rows.shape[1]} for a layer of {spec.in_features} inputs")
        arguments = (*weights_of(packed, spec), spec.out_features)
        if x.requires_grad and torch.is_grad_enabled():
            out = CpuLinear.apply(rows, *arguments)
        else:
            out = torch.ops.graftq.cpu_linear(rows, *arguments)
        return out if x.dim() == 2 else out.view(*x.shape[:-1], spec.out_features)


@pluggy.HookimplMarker("graftq")
def graftq_kernels() -> Iterable[KernelProvider]:
    """Register the CPU kernels."""
    return [CpuProvider()]


@pluggy.HookimplMarker("graftq")
def graftq_experts_kernels() -> Iterable[ExpertsProvider]:
    """Register their form for experts."""
    from graftq.quant_linear.cpu_experts import CpuExperts  # which is built upon the functions above

    return [CpuExperts()]
