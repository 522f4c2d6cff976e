"""Random experts in the checkpoint's format, and what they should compute, for the tests of fused kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from graftq.quant_linear.activations import Activate, Activation
from graftq.quant_linear.experts import QuantExpert, QuantExperts
from graftq.quant_linear.layouts import GptqTensors
from graftq.quant_linear.linear import QuantLinear
from graftq.quant_linear.reference import TorchProvider
from graftq.quant_linear.selection import KernelProvider, Request, Selection
from support.projections import Shape, make

ORDERS = ("none", "all", "some", "apart")
"""Which experts have act-order: "some" leaves the first without; "apart" gives gate and up each their own."""

STYLES = ("gate and up", "gate_up", "up")


@dataclass(frozen=True)
class Experts:
    """The experts of one layer to make up; ``group`` as in ``quantize_config.json``, ``scale`` for four bits."""

    count: int = 3
    hidden: int = 64
    inner: int = 48
    bits: int = 4
    group: int = 32
    order: str = "all"
    sym: bool = True
    zero_offset: int = 1
    style: str = "gate and up"
    concatenated: bool = True
    activation: str = "silu"
    scales: torch.dtype = torch.float16
    bias: bool = False
    layer_bias: bool = False
    norm: bool = False
    scale: float = 0.02

    def __str__(self) -> str:
        usual = Experts()
        return "-".join(f"{name}={value}" for name, value in vars(self).items() if value != getattr(usual, name)) or "-"

    def shapes(self) -> dict[str, Shape]:
        """The projections, without act-order."""
        common = Shape(
            self.bits, self.hidden, self.inner, self.group, False, self.sym, self.zero_offset, self.scales, self.bias
        )
        down = replace(common, k=self.inner, n=self.hidden)
        names = {"gate and up": ("gate_proj", "up_proj"), "gate_up": ("gate_up_proj",), "up": ("up_proj",)}[self.style]
        up = replace(common, n=self.inner * (2 if self.style == "gate_up" else 1))
        return {**dict.fromkeys(names, up), "down_proj": down}

    def tensors(self, device: str = "cpu") -> list[dict[str, tuple[Shape, GptqTensors]]]:
        """All projections of all experts."""
        experts = []
        for expert in range(self.count):
            has_order = self.order != "none" and (self.order != "some" or expert > 0)
            made = {}
            for index, (name, shape) in enumerate(self.shapes().items()):
                shape = replace(shape, act_order=has_order and shape.spec().num_groups > 1)
                made[name] = (
                    shape,
                    make(shape, seed=31 * expert + index, device=device, scale=self.scale * 16 / 2**self.bits),
                )
            if self.order != "apart" and "gate_proj" in made:
                shape, gate = made["gate_proj"]
                made["gate_proj"] = (shape, replace(gate, g_idx=made["up_proj"][1].g_idx))
            experts.append(made)
        return experts

    def activate(self) -> Activate:
        """As a model would write it."""
        if self.activation == "unknown":
            return lambda x: x[..., : self.inner] * torch.linspace(-1, 1, self.inner, device=x.device).to(x.dtype)
        formula = Activation(self.activation, 1.702, 7.0)
        if self.style == "up":
            return lambda x: formula(None, x)
        if self.concatenated:
            return lambda x: formula(*x.chunk(2, dim=-1))
        return lambda x: formula(x[..., ::2], x[..., 1::2])

    def module(self, provider: KernelProvider, device: str = "cpu", dtype: torch.dtype = torch.float32) -> QuantExperts:
        """The module, which will choose ``provider``."""
        return build(self, self.tensors(device), provider, device, dtype)


def build(
    case: Experts,
    tensors: list[dict[str, tuple[Shape, GptqTensors]]],
    provider: KernelProvider,
    device: str,
    dtype: torch.dtype,
) -> QuantExperts:
    """The module of these tensors."""
    experts = [
        QuantExpert({name: _linear(shape, stored, dtype) for name, (shape, stored) in made.items()}) for made in tensors
    ]
    generator = torch.Generator().manual_seed(5)
    extra: dict[str, Any] = {}
    if case.layer_bias:
        width = case.inner * (1 if case.style == "up" else 2)
        for argument, size in (("up_bias", width), ("down_bias", case.hidden)):
            value = torch.randn(case.count, size, generator=generator).to(device, dtype)
            extra[argument] = (f"{argument}_of_the_layer", nn.Parameter(value, requires_grad=False))
    if case.norm:
        norm = nn.RMSNorm(case.hidden).to(device, dtype)
        nn.init.normal_(norm.weight, generator=None)
        extra["post_expert_norm"] = norm
    return QuantExperts(
        experts,
        lambda request: _chosen(provider),
        case.activate(),
        is_concatenated=case.concatenated,
        **extra,
    )


def rebuilt(module: QuantExperts, provider: KernelProvider, device: str, dtype: torch.dtype) -> QuantExperts:
    """The same experts (without biases of the layer's own) in another module, which will choose ``provider``."""

    def layer(name: str, expert: int) -> QuantLinear:
        stored = vars(module.checkpoint_tensors(name, expert)).values()
        moved = GptqTensors(*(None if tensor is None else tensor.to(device) for tensor in stored))
        return QuantLinear.from_tensors(module.spec.of(name)[expert], moved, _choose_reference, dtype)

    experts = [
        QuantExpert({name: layer(name, expert) for name in module.spec.names}) for expert in range(module.num_experts)
    ]
    return QuantExperts(experts, lambda request: _chosen(provider), module.activate, module.spec.is_concatenated)


def _chosen(provider: KernelProvider) -> Selection:
    provider.prepare()
    return Selection(provider, {})


def _choose_reference(request: Request) -> Selection:
    return Selection(TorchProvider(), {})


def _linear(shape: Shape, stored: GptqTensors, dtype: torch.dtype) -> QuantLinear:
    return QuantLinear.from_tensors(shape.spec(), stored, _choose_reference, dtype)


def expected(
    case: Experts, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, module: QuantExperts | None = None
) -> torch.Tensor:
    """The reference's answer in float32 (float64 would dequantize no better), from fresh tensors."""
    reference = case.module(TorchProvider(), x.device.type)
    if module is not None and case.norm:
        reference.post_expert_norm = module.post_expert_norm.float()
    return reference(x.float(), index, weights.float())


def routing(
    tokens: int, top_k: int, count: int, seed: int = 0, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct experts for each token, as a router chooses them, and weights that sum to one."""
    generator = torch.Generator().manual_seed(seed)
    weights, index = torch.rand(tokens, count, generator=generator).topk(top_k, dim=-1)
    return index.to(device), (weights / weights.sum(-1, keepdim=True)).to(device)
