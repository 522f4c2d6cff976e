"""Kernels for any device that rearrange the weights, as the fast ones do, and compute by the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from graftq.plugin import manager
from graftq.quant_linear.experts import QuantExperts
from graftq.quant_linear.experts_spec import ExpertsSpec
from graftq.quant_linear.gpu.tiled_layout import TiledLayout
from graftq.quant_linear.layouts import GptqTensors, Packed, SeparateLayout
from graftq.quant_linear.linear import QuantLinear
from graftq.quant_linear.reference import TorchExperts, TorchProvider
from graftq.quant_linear.selection import Accepted, Request, Verdict
from graftq.quant_linear.spec import QuantSpec


@dataclass(frozen=True)
class FusedLayout:
    """Every tensor of every expert under one flat name: enough to take the experts' layers away."""

    spec: ExpertsSpec

    def pack(self, take: Callable[[str, int], GptqTensors]) -> Packed:
        tensors = {
            f"packed_{name}_{expert}_{suffix}": tensor
            for expert in range(self.spec.num_experts)
            for name in self.spec.names
            for suffix, tensor in vars(take(name, expert)).items()
            if tensor is not None
        }
        return Packed(tensors)

    def unpack(self, packed: Packed, name: str, expert: int) -> GptqTensors:
        start = f"packed_{name}_{expert}_"
        return GptqTensors(**{key.removeprefix(start): value for key, value in packed.items() if key.startswith(start)})


class RepackingExperts:
    """All experts' tensors in the experts module itself."""

    def judge(self, request: Request[ExpertsSpec]) -> Verdict:
        return Accepted()

    def layout(self, spec: ExpertsSpec) -> FusedLayout:
        return FusedLayout(spec)

    def experts(
        self, module: QuantExperts, x: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        layout = SeparateLayout(module.spec)
        twin = QuantExperts.__new__(QuantExperts)
        twin.__dict__ = {**module.__dict__, "_modules": {}, "layout": layout, "form": None}
        for expert in range(module.num_experts):
            twin.add_module(str(expert), module._separate(module.checkpoint_tensors, expert))
        for child in twin.modules():
            if isinstance(child, QuantLinear):
                child.bind(x.device.type, x.dtype)
        return TorchExperts().experts(twin, x, top_k_index, top_k_weights)


class RepackingProvider(TorchProvider):
    """Tiles, as the Triton kernels read them."""

    name = "repacking"
    priority = 1000
    experts = RepackingExperts()

    def layout(self, spec: QuantSpec) -> TiledLayout:
        return TiledLayout(spec)

    def judge(self, request: Request[QuantSpec]) -> Verdict:
        return Accepted()


@pytest.fixture
def repacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that are loaded in this test rearrange their weights."""
    kernels = manager.kernel_providers()
    monkeypatch.setattr(manager, "kernel_providers", lambda: (*kernels, RepackingProvider()))
