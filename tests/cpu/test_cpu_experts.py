"""Experts on a CPU, all in one op per projection, against the reference that runs them one by one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.experts import ORDERS, STYLES, Experts, build, expected, routing
from support.projections import relative_error

from graftq.plugin.manager import choose_experts_kernel
from graftq.quant_linear import cpu_kernels
from graftq.quant_linear.cpu_experts import CpuExperts
from graftq.quant_linear.experts import QuantExperts
from graftq.quant_linear.reference import TorchExperts
from graftq.quant_linear.selection import ExpertsRequest, Rejected

CASES = [
    *(Experts(order=order) for order in ORDERS),
    *(Experts(style=style, bias=True, layer_bias=True) for style in STYLES),
    Experts(concatenated=False, activation="swiglu_oai", layer_bias=True),
    Experts(activation="unknown", norm=True),
    Experts(bits=3, group=-1, order="none"),
    Experts(bits=8, sym=False, group=16, order="some"),
    Experts(bits=2, hidden=72, inner=40, zero_offset=0, scales=torch.bfloat16),
]
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 1e-2}


def run(module: QuantExperts, tokens: int, top_k: int, dtype: torch.dtype, hidden: int) -> tuple[torch.Tensor, ...]:
    x = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(tokens)).to(dtype)
    index, weights = routing(tokens, top_k, module.num_experts)
    return x, index, weights.to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_product(case: Experts, dtype: torch.dtype) -> None:
    for tokens, top_k in ((1, 2), (9, 3)):
        module = case.module(CpuExperts(), dtype=dtype)
        arguments = run(module, tokens, top_k, dtype, case.hidden)
        out = module(*arguments)
        assert out.dtype == dtype
        assert relative_error(out, expected(case, *arguments, module)) < TOLERANCE[dtype]


@pytest.mark.parametrize("order", ORDERS)
def test_eight_bits_kept_as_bytes(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernels, "_LEAST_BYTES", {})
    case = Experts(bits=8, sym=False, group=16, order=order, bias=True)
    for dtype, tolerance in TOLERANCE.items():
        module = case.module(CpuExperts(), dtype=dtype)
        arguments = run(module, 9, 3, dtype, case.hidden)
        assert relative_error(module(*arguments), expected(case, *arguments, module)) < tolerance
    stored = case.tensors()[1]["down_proj"][1]
    assert module.checkpoint_tensors("down_proj", 1).qweight.equal(stored.qweight)


def test_many_tokens_of_few_experts() -> None:
    case = Experts(count=2)
    module = case.module(CpuExperts(), dtype=torch.bfloat16)
    arguments = run(module, 120, 1, torch.bfloat16, case.hidden)
    assert relative_error(module(*arguments), expected(case, *arguments)) < 1e-2


@pytest.mark.parametrize("tokens", [0, 1, 6])
def test_experts_of_other_ranks_add_nothing(tokens: int) -> None:
    case = Experts(layer_bias=True)
    module = case.module(CpuExperts())
    x, index, weights = run(module, tokens, 2, torch.float32, case.hidden)
    index[::2, 0] = case.count
    index[1::3, 1] = case.count + 5
    out = module(x, index, weights)
    assert out.shape == x.shape
    if tokens:
        assert relative_error(out, expected(case, x, index, weights)) < 3e-6


@pytest.mark.parametrize("case", CASES, ids=str)
def test_checkpoint_tensors_come_back(case: Experts) -> None:
    stored = case.tensors()
    module = build(case, case.tensors(), CpuExperts(), "cpu", torch.bfloat16)
    module.bind("cpu", torch.bfloat16)
    assert not list(module.children()) or case.norm
    for expert, projections in enumerate(stored):
        for name, (_, tensors) in projections.items():
            for suffix, tensor in vars(tensors).items():
                found = getattr(module.checkpoint_tensors(name, expert), suffix)
                assert (tensor is None and found is None) or (tensor.dtype == found.dtype and tensor.equal(found))


def test_uneven_groups_and_dtypes_of_their_own() -> None:
    """One expert's groups lie unevenly, another stores its scales and g_idx in other dtypes."""
    case = Experts(hidden=128, group=64)
    tensors, reference = case.tensors(), case.tensors()
    for made in (tensors, reference):
        shape, gate = made[1]["gate_proj"]
        uneven = torch.repeat_interleave(torch.tensor([40, 88]))[torch.randperm(128, generator=torch.Generator())]
        made[1]["gate_proj"] = (shape, replace(gate, g_idx=uneven.to(torch.int64), scales=gate.scales.float()))
    module = build(case, tensors, CpuExperts(), "cpu", torch.float32)
    arguments = run(module, 5, 2, torch.float32, case.hidden)
    wanted = build(case, reference, TorchExperts(), "cpu", torch.float32)(*arguments)
    assert relative_error(module(*arguments), wanted) < 3e-6
    found = module.checkpoint_tensors("gate_proj", 1)
    assert found.g_idx.dtype == torch.int64
    assert found.scales.equal(reference[1]["gate_proj"][1].scales)
    assert found.qweight.equal(reference[1]["gate_proj"][1].qweight)


def test_gradient() -> None:
    case = Experts(layer_bias=True, sym=False)
    module = case.module(CpuExperts())
    x, index, weights = run(module, 7, 2, torch.float32, case.hidden)
    index[0, 0] = case.count
    grads = []
    for other in (module, None):
        inputs = x.clone().requires_grad_()
        routed = weights.clone().requires_grad_()
        out = module(inputs, index, routed) if other else expected(case, inputs, index, routed)
        out.square().sum().backward()
        grads.append((inputs.grad, routed.grad))
    for mine, theirs in zip(*grads, strict=True):
        assert relative_error(mine, theirs) < 1e-5


def test_compiles_into_one_graph() -> None:
    case = Experts(layer_bias=True)
    module = case.module(CpuExperts())
    arguments = run(module, 3, 2, torch.float32, case.hidden)
    wanted = module(*arguments)
    assert torch.allclose(torch.compile(module, fullgraph=True, backend="aot_eager")(*arguments), wanted)


def test_experts_that_are_packed_differently_run_one_by_one() -> None:
    case = Experts()
    tensors = case.tensors()
    tensors[0]["up_proj"] = replace(case, bits=8).tensors()[0]["up_proj"]
    module = build(case, tensors, CpuExperts(), "cpu", torch.float32)
    request = ExpertsRequest(module.spec, "cpu", torch.float32)
    verdict = CpuExperts().judge(request)
    assert isinstance(verdict, Rejected)
    assert verdict.reason == "the experts' up_proj differ in bits"
    assert choose_experts_kernel(request).provider.name == "torch"
    assert (
        choose_experts_kernel(ExpertsRequest(case.module(CpuExperts()).spec, "cpu", torch.float32)).provider.name
        == "cpu"
    )
