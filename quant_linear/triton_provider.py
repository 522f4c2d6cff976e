"""The ``triton`` provider: every dense GPTQ configuration on a GPU, by kernels compiled when they are first needed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import pluggy
import torch

from graftq.quant_linear.dispatch import is_unwatched
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
from graftq.quant_linear.tiled_layout import TiledLayout


class TritonProvider:
    """Repacks the weights into tiles once (:class:`TiledLayout`), and multiplies straight from them."""

    name = "triton"
    priority = 100

    def judge(self, request: Request | ExpertsRequest) -> Verdict:
        """Accept fp16 and bf16 on GPUs, wherever Triton is installed."""
        if request.device not in ("cuda", "xpu"):
            return Rejected(f"no Triton kernels for device type {request.device}")
        if importlib.util.find_spec("triton") is None:
            return Rejected("triton is not installed", "install it: pip install triton")
        if request.dtype not in (torch.float16, torch.bfloat16):
            reason = f"{request.dtype} activations; the kernels compute in float16 and bfloat16"
            return Rejected(reason, "load the model with dtype=torch.float16 or torch.bfloat16")
        return Accepted()

    def layout(self, spec: QuantSpec) -> TiledLayout:
        """Tiles in the order of the matrix instructions."""
        _ops()  # whoever packs will multiply: what Triton does once belongs to loading
        return TiledLayout(spec)

    def linear(self, x: torch.Tensor, packed: Mapping[str, torch.Tensor], spec: QuantSpec) -> torch.Tensor:
        """``x @ W.T + bias``; ``x`` [..., in_features], any strides; returns [..., out_features], contiguous.

        Differentiable in ``x``. Raises RuntimeError for a last dimension that is not ``in_features``.
        """
        arguments = (
            x,
            packed["codes"],
            packed.get("high"),
            packed["scales"],
            None if spec.sym else packed["qzeros"],
            packed.get("order"),
            packed.get("bias"),
            spec.signature,
        )
        if x.requires_grad and torch.is_grad_enabled():
            return _ops().TiledLinear.apply(*arguments)
        return (_ops().tiled_linear if is_unwatched(x) else torch.ops.graftq.tiled_linear)(*arguments)


@cache
def _ops() -> Any:
    from graftq.quant_linear import ops  # not at the top, where triton may be absent
    from graftq.quant_linear.kernels.launch import hash_triton

    hash_triton()
    return ops


@pluggy.HookimplMarker("graftq")
def graftq_kernels() -> Iterable[KernelProvider]:
    """Register the Triton kernels."""
    return [TritonProvider()]


@pluggy.HookimplMarker("graftq")
def graftq_experts_kernels() -> Iterable[ExpertsProvider]:
    """Register their form for experts."""
    from graftq.quant_linear.triton_experts import TritonExperts  # which is built upon the provider above

    return [TritonExperts()]
