"""Training adapters around packed layers, with no library for that, by the kernels of the CPU and of a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.loading import load
from support.models import relative_error
from support.training import PLACES, REAL, rows_of_text
from torch import nn

from graftq.quant_linear.experts import QuantExperts
from graftq.quant_linear.layouts import SeparateLayout
from graftq.quant_linear.linear import QuantLinear

# transformers 5.23 renames it; 5.16 knows no other name.
pytestmark = pytest.mark.filterwarnings(r"ignore:`\w*gradient_checkpointing\w*` is deprecated")

RANK = 4
LIMIT = {torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 5e-2}


class Adapter(nn.Module):
    """Low-rank products in float32, one for each of ``count`` experts."""

    def __init__(self, in_features: int, out_features: int, count: int = 1):
        super().__init__()
        self.down = nn.Parameter(torch.randn(count, in_features, RANK) / in_features**0.5)
        self.up = nn.Parameter(torch.randn(count, RANK, out_features) * 0.02)

    def forward(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        return x.float() @ self.down[expert] @ self.up[expert]


class AdaptedLinear(nn.Module):
    def __init__(self, base: QuantLinear):
        super().__init__()
        self.base, self.adapter = base, Adapter(base.in_features, base.out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.adapter(0, x).to(x.dtype)


class AdaptedExperts(nn.Module):
    def __init__(self, base: QuantExperts):
        super().__init__()
        self.base = base
        base.separate = True
        up, down = base.spec.of("up_proj")[0], base.spec.of("down_proj")[0]
        self.up = Adapter(up.in_features, 2 * up.out_features, base.num_experts)
        self.down = Adapter(down.in_features, down.out_features, base.num_experts)

    def forward(self, *arguments: torch.Tensor) -> torch.Tensor:
        with self.base.adding("up", self.up), self.base.adding("down", self.down):
            return self.base(*arguments)


def adapted(experts: str, device: str, dtype: torch.dtype, **config: Any) -> Any:
    """The Mixtral with adapters around attention, and around experts that are "apart": the same ones every time."""
    model = load(REAL, dtype=dtype, device_map=device, **config).requires_grad_(False).train()
    torch.manual_seed(0)
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantLinear) and "self_attn" in name:
            model.set_submodule(name, AdaptedLinear(module).to(device))
        elif isinstance(module, QuantExperts) and experts == "apart":
            model.set_submodule(name, AdaptedExperts(module).to(device))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def backward(model: Any) -> float:
    """The loss, once every adapter has its gradient."""
    ids = rows_of_text(2, 64).to(model.device)
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.item()


def gradient(model: Any) -> torch.Tensor:
    """Of all adapters in one vector."""
    return torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.requires_grad])


EXPERTS = pytest.mark.parametrize("experts", ["fused", "apart"])
EVERY_EXPERT = {"num_experts_per_tok": 8}
"""So that rounding sends no token to other experts."""


@pytest.fixture(scope="module")
def truth() -> dict[str, torch.Tensor]:
    """Gradients by the reference in float32."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRAFTQ_KERNEL", "torch")
        for experts in ("fused", "apart"):
            model = adapted(experts, "cpu", torch.float32, **EVERY_EXPERT)
            backward(model)
            found[experts] = gradient(model)
    return found


@PLACES
@EXPERTS
def test_gradients(experts: str, device: str, dtype: torch.dtype, truth: dict[str, torch.Tensor]) -> None:
    model = adapted(experts, device, dtype, **EVERY_EXPERT)
    backward(model)
    assert relative_error(gradient(model), truth[experts]) < LIMIT[dtype]


@PLACES
@EXPERTS
def test_adapters_learn(experts: str, device: str, dtype: torch.dtype) -> None:
    model = adapted(experts, device, dtype)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    first = backward(model)
    for _ in range(3):
        optimizer.step()
        optimizer.zero_grad()
        last = backward(model)
    assert last < first - 0.2
    assert gradient(model).isfinite().all()
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert_kernels(model, experts, device)


def assert_kernels(model: Any, experts: str, device: str) -> None:
    """What has just been trained ran by the device's kernels, and experts in one as long as they may."""
    kernel = "triton" if device == "cuda" else "cpu"
    assert {layer.kernel for layer in model.modules() if isinstance(layer, QuantLinear)} == {kernel}
    found = [module for module in model.modules() if isinstance(module, QuantExperts)]
    assert {isinstance(module.layout, SeparateLayout) for module in found} == {experts == "apart"}
    assert {module.kernel for module in found} == {"torch" if experts == "apart" else kernel}
