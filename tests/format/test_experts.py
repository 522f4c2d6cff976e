"""Experts and the layouts that kernels want of them: nothing is lost on the way there and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from support.gptq import Recipe, quantize
from support.specs import spec_of

from graftq.quant_linear.experts import QuantExpert, QuantExperts
from graftq.quant_linear.experts_spec import ExpertsSpec
from graftq.quant_linear.layouts import GptqTensors, Packed
from graftq.quant_linear.linear import QuantLinear
from graftq.quant_linear.reference import TorchProvider
from graftq.quant_linear.selection import Accepted, Request, Selection, Verdict, select

HIDDEN, WIDE, EXPERTS = 64, 32, 3


@dataclass(frozen=True)
class HeapLayout:
    """All tensors of all experts under numbers."""

    spec: ExpertsSpec

    def pack(self, take: Callable[[str, int], GptqTensors]) -> Packed:
        heap = Packed({})
        for name in self.spec.names:
            for expert in range(self.spec.num_experts):
                for suffix, tensor in vars(take(name, expert)).items():
                    if tensor is not None:
                        heap[f"{name}_{expert}_{suffix}"] = tensor
        return heap

    def unpack(self, packed: Packed, name: str, expert: int) -> GptqTensors:
        return GptqTensors(
            **{suffix: packed.get(f"{name}_{expert}_{suffix}") for suffix in GptqTensors.__annotations__}
        )


class HeapExperts:
    def judge(self, request: Request) -> Verdict:
        return Accepted()

    def layout(self, spec: ExpertsSpec) -> HeapLayout:
        return HeapLayout(spec)

    def experts(
        self, module: QuantExperts, x: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        return x * len(module.packed())


class HeapProvider(TorchProvider):
    name, priority, experts = "heap", 5, HeapExperts()


def choose_linear(request: Request) -> Selection:
    return select(request, [TorchProvider()])


def choose_heap_for_half(request: Request) -> Selection:
    fused = [HeapProvider()] if request.dtype == torch.float16 else []
    return select(request, [TorchProvider(), *fused])


@pytest.fixture
def tensors() -> dict[str, dict[str, torch.Tensor]]:
    shapes = {"gate_proj": (WIDE, HIDDEN), "up_proj": (WIDE, HIDDEN), "down_proj": (HIDDEN, WIDE)}
    return {
        f"{expert}.{name}": quantize(torch.randn(shape), Recipe(group_size=16), np.random.default_rng())[0]
        for expert in range(EXPERTS)
        for name, shape in shapes.items()
    }


def activate(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def build(tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> QuantExperts:
    def layer(name: str) -> QuantLinear:
        spec = spec_of(tensors[name], Recipe(group_size=16))
        return QuantLinear.from_tensors(spec, GptqTensors(**tensors[name]), choose_linear, torch.float32)

    names = ("down_proj", "gate_proj", "up_proj")  # in no particular order
    experts = [QuantExpert({name: layer(f"{expert}.{name}") for name in names}) for expert in range(EXPERTS)]
    return QuantExperts(experts, choose_heap_for_half, activate)


def stored(experts: QuantExperts) -> dict[str, dict[str, torch.Tensor]]:
    return {
        f"{expert}.{name}": {
            suffix: tensor
            for suffix, tensor in vars(experts.checkpoint_tensors(name, expert)).items()
            if tensor is not None
        }
        for expert in range(EXPERTS)
        for name in experts.spec.names
    }


def run(experts: QuantExperts, dtype: torch.dtype) -> torch.Tensor:
    torch.manual_seed(0)
    x, weights = torch.randn(5, HIDDEN).to(dtype), torch.rand(5, 2)
    return experts(x, torch.randint(EXPERTS + 1, (5, 2)), weights)


def test_what_they_are(tensors: dict[str, dict[str, torch.Tensor]]) -> None:
    spec = build(tensors).spec
    assert spec.names == ("gate_proj", "up_proj", "down_proj")
    assert spec.num_experts == EXPERTS
    assert spec.is_gated
    assert spec.activation is not None
    assert spec.activation.name == "silu"
    for _, specs in spec.projections:
        assert len({(each.bits, each.in_features, each.out_features, each.group_size) for each in specs}) == 1


def test_into_a_fused_layout_and_back(tensors: dict[str, dict[str, torch.Tensor]]) -> None:
    experts = build(tensors)
    expected = run(experts, torch.float32)
    assert torch.equal(run(experts, torch.float16), run(experts, torch.float16))
    assert not [name for name, _ in experts.named_children()]
    assert set(dict(experts.named_buffers())) == set(experts.packed())
    for name, found in stored(experts).items():
        assert all(found[suffix].equal(tensor) for suffix, tensor in tensors[name].items())
    assert torch.equal(run(experts, torch.float32), expected)
    assert len(list(experts.named_children())) == EXPERTS
    assert not experts.packed()
    assert stored(experts).keys() == tensors.keys()


def test_offloaded_experts_stay_as_stored(tensors: dict[str, dict[str, torch.Tensor]]) -> None:
    experts = build(tensors)
    experts.pinned = True
    experts.bind("cpu", torch.float16)
    assert [child.pinned for child in experts.modules() if isinstance(child, QuantLinear)] == [True] * 9
