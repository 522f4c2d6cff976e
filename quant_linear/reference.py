"""The ``torch`` provider: any device, any dtype, any configuration, and the truth the others are held to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pluggy
import torch

from graftq.quant_linear.experts_spec import ExpertsSpec
from graftq.quant_linear.layouts import CheckpointLayout, Packed, SeparateLayout
from graftq.quant_linear.packing import dequantize
from graftq.quant_linear.selection import Accepted, ExpertsModule, KernelProvider, Request, Verdict
from graftq.quant_linear.spec import QuantSpec


class TorchExperts:
    """Expert by expert, each projection by whichever kernel its own layer has chosen."""

    def judge(self, request: Request[ExpertsSpec]) -> Verdict:
        """Accept everything."""
        return Accepted(repacks=False)

    def layout(self, spec: ExpertsSpec) -> SeparateLayout:
        """A layer per projection, as loaded."""
        return SeparateLayout(spec)

    def experts(
        self, module: ExpertsModule, x: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Shapes as in :meth:`QuantExperts.forward`. Waits for the device, to learn which experts have tokens."""
        total = torch.zeros_like(x, dtype=torch.float32)
        for index in torch.unique(top_k_index).tolist():
            if 0 <= index < module.num_experts:
                token, slot = torch.where(top_k_index == index)
                output = _run_expert(module, index, x[token]) * top_k_weights[token, slot, None]
                total.index_add_(0, token, output.to(torch.float32))
        return total.to(x.dtype)


class TorchProvider:
    """Dequantizes in float32 at every call and multiplies in the activations' dtype."""

    name = "torch"
    priority = 0
    experts = TorchExperts()

    def judge(self, request: Request[QuantSpec]) -> Verdict:
        """Accept everything."""
        return Accepted(repacks=False)

    def prepare(self) -> None:
        """Nothing to prepare."""

    def layout(self, spec: QuantSpec) -> CheckpointLayout:
        """The checkpoint's own."""
        return CheckpointLayout(spec)

    def linear(self, x: torch.Tensor, packed: Mapping[str, torch.Tensor], spec: QuantSpec) -> torch.Tensor:
        """``x @ W.T + bias``; ``x`` [..., in_features] in any float dtype, returns [..., out_features] in the same.

        Raises:
            RuntimeError: if the weights are on the meta device and ``x`` is not: torch would multiply by anything.
        """
        tensors = self.layout(spec).unpack(Packed(packed))
        if tensors.qweight.is_meta and not x.is_meta:
            raise RuntimeError(f"the packed weights of {spec} are on the meta device, and no hook has brought them in")
        bias = None if tensors.bias is None else tensors.bias[: spec.out_features].to(x.dtype)
        return torch.nn.functional.linear(x, dequantize(tensors, spec).to(x.dtype), bias)


def _run_expert(module: ExpertsModule, index: int, x: torch.Tensor) -> torch.Tensor:
    expert: Any = module.get_submodule(str(index))
    hidden = _add(_up(expert, x, module.spec.is_concatenated), module.up_bias, index)
    inner = module.activate(module.add("up", index, x, hidden))
    output = module.add("down", index, inner, _add(expert.down_proj(inner), module.down_bias, index))
    return output if module.post_expert_norm is None else module.post_expert_norm(output)


def _up(expert: Any, x: torch.Tensor, is_concatenated: bool) -> torch.Tensor:
    if hasattr(expert, "gate_up_proj"):
        return expert.gate_up_proj(x)
    if not hasattr(expert, "gate_proj"):
        return expert.up_proj(x)
    gate, up = expert.gate_proj(x), expert.up_proj(x)
    return torch.cat((gate, up), dim=-1) if is_concatenated else torch.stack((gate, up), dim=-1).flatten(-2)


def _add(x: torch.Tensor, bias: torch.Tensor | None, index: int) -> torch.Tensor:
    return x if bias is None else x + bias[index].to(x.dtype)


@pluggy.HookimplMarker("graftq")
def graftq_kernels() -> Iterable[KernelProvider]:
    """Register the reference."""
    return [TorchProvider()]
