"""The ``triton`` provider: every dense GPTQ configuration on a GPU, by kernels compiled when they are first needed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import pluggy
import torch

from graftq.quant_linear.gpu.availability import judge_triton, start_triton
from graftq.quant_linear.gpu.dispatch_bypass import is_unwatched
from graftq.quant_linear.gpu.experts.provider import TritonExperts
from graftq.quant_linear.gpu.tiled_layout import TiledLayout
from graftq.quant_linear.selection import KernelProvider, Request, Verdict
from graftq.quant_linear.spec import QuantSpec


class TritonProvider:
    """Repacks the weights into tiles once (:class:`TiledLayout`), and multiplies straight from them."""

    name = "triton"
    priority = 100
    experts = TritonExperts()

    def judge(self, request: Request[QuantSpec]) -> Verdict:
        """Accept fp16 and bf16 on GPUs, wherever Triton is installed."""
        return judge_triton(request)

    def prepare(self) -> None:
        """Define the operators, and let Triton start while a model loads rather than at its first token."""
        import graftq.quant_linear.gpu.experts.autograd
        import graftq.quant_linear.gpu.linear_ops  # noqa: F401 - both define operators

        start_triton()

    def layout(self, spec: QuantSpec) -> TiledLayout:
        """Tiles in the order of the matrix instructions."""
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
            None if spec.sym else packed["zeros"],
            packed.get("order"),
            packed.get("bias"),
            spec.signature,
        )
        if x.requires_grad and torch.is_grad_enabled():
            from graftq.quant_linear.gpu.linear_ops import (
                TiledLinear,  # not by `_ops`, which torch.compile would follow
            )

            return TiledLinear.apply(*arguments)
        return (_ops().tiled_linear if is_unwatched(x) else torch.ops.graftq.tiled_linear)(*arguments)


@cache
def _ops() -> Any:
    from graftq.quant_linear.gpu import linear_ops  # not at the top, where triton may be absent

    return linear_ops


@pluggy.HookimplMarker("graftq")
def graftq_kernels() -> Iterable[KernelProvider]:
    """Register the Triton kernels."""
    return [TritonProvider()]
