"""The ``cpu`` provider: every dense GPTQ configuration on a CPU, by the kernels that torch brings along."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import pluggy
import torch

from graftq.quant_linear.cpu.availability import judge_cpu, layout_of, weights_of
from graftq.quant_linear.cpu.experts import CpuExperts
from graftq.quant_linear.cpu.layout import CpuLayout
from graftq.quant_linear.cpu.ops import product
from graftq.quant_linear.selection import KernelProvider, Request, Verdict
from graftq.quant_linear.spec import QuantSpec


class CpuProvider:
    """Rearranges the weights once (:class:`CpuLayout`), and multiplies straight from them.

    bf16 and fp16 models compute in bf16 with float32 sums (relative error below 1e-2), float32 ones in float32.
    """

    name = "cpu"
    priority = 50
    experts = CpuExperts()

    def judge(self, request: Request[QuantSpec]) -> Verdict:
        """Accept every projection on a CPU."""
        return judge_cpu(request)

    def prepare(self) -> None:
        """Nothing to prepare: importing this module has defined the operators."""

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
        out = product("cpu_linear", rows, *weights_of(packed, spec), spec.out_features)
        return out if x.dim() == 2 else out.view(*x.shape[:-1], spec.out_features)


@pluggy.HookimplMarker("graftq")
def graftq_kernels() -> Iterable[KernelProvider]:
    """Register the CPU kernels."""
    return [CpuProvider()]
