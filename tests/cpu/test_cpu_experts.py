"""Experts on a CPU, all in one op per projection, against the reference that runs them one by one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.experts import ORDERS, STYLES, Experts, build, expected, routing
from support.projections import Shape, relative_error

from graftq.plugin.manager import choose_kernel
from graftq.quant_linear.cpu import kernels as cpu_kernels
from graftq.quant_linear.cpu.provider import CpuProvider
from graftq.quant_linear.experts import QuantExperts
from graftq.quant_linear.layouts import GptqTensors
from graftq.quant_linear.reference import TorchProvider
from graftq.quant_linear.selection import KernelProvider, Rejected, Request

JOINED = {
    "act-order": Experts(inner=64),
    "act-order in some, 8 bits": Experts(inner=64, bits=8, sym=False, group=16, order="some"),
    "no act-order, biases": Experts(inner=128, bits=3, order="none", bias=True, layer_bias=True),
    "interleaved": Experts(inner=64, concatenated=False, activation="swiglu_oai", layer_bias=True),
}
"""Experts whose gate and up are one projection: their outputs fill whole blocks."""

CASES = [
    *(Experts(order=order) for order in ORDERS),
    *(Experts(style=style, bias=True, layer_bias=True) for style in STYLES),
    Experts(concatenated=False, activation="swiglu_oai", layer_bias=True),
    Experts(activation="unknown", norm=True),
    Experts(bits=3, group=-1, order="none"),
    Experts(bits=8, sym=False, group=16, order="some"),
    *(Experts(bits=bits, scale=-0.02) for bits in (2, 3, 4, 8)),
    Experts(bits=2, hidden=72, inner=40, zero_offset=0, scales=torch.bfloat16),
    *JOINED.values(),
]
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 1e-2}


def run(module: QuantExperts, tokens: int, top_k: int, dtype: torch.dtype, hidden: int) -> tuple[torch.Tensor, ...]:
    x = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(tokens)).to(dtype)
    index, weights = routing(tokens, top_k, module.num_experts)
    return x, index, weights.to(dtype)


def assert_restored(module: QuantExperts, stored: list[dict[str, tuple[Shape, GptqTensors]]]) -> None:
    for expert, projections in enumerate(stored):
        for name, (_, tensors) in projections.items():
            found = module.checkpoint_tensors(name, expert)
            for suffix, tensor in vars(tensors).items():
                other = getattr(found, suffix)
                assert (tensor is None and other is None) or (tensor.dtype == other.dtype and tensor.equal(other))
                assert other is None or other.is_contiguous()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_product(case: Experts, dtype: torch.dtype) -> None:
    for tokens, top_k in ((1, 2), (9, 3)):
        module = case.module(CpuProvider(), dtype=dtype)
        arguments = run(module, tokens, top_k, dtype, case.hidden)
        out = module(*arguments)
        assert out.dtype == dtype
        assert relative_error(out, expected(case, *arguments, module)) < TOLERANCE[dtype]


@pytest.mark.parametrize("inner", [48, 64], ids=["apart", "joined"])
@pytest.mark.parametrize("order", ORDERS)
def test_eight_bits_kept_as_bytes(order: str, inner: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernels, "_LEAST_BYTES", {})
    case = Experts(bits=8, inner=inner, sym=False, group=16, order=order, bias=True)
    for dtype, tolerance in TOLERANCE.items():
        module = case.module(CpuProvider(), dtype=dtype)
        arguments = run(module, 9, 3, dtype, case.hidden)
        assert relative_error(module(*arguments), expected(case, *arguments, module)) < tolerance
    assert_restored(module, case.tensors())


def test_many_tokens_of_few_experts() -> None:
    case = Experts(count=2)
    module = case.module(CpuProvider(), dtype=torch.bfloat16)
    arguments = run(module, 120, 1, torch.bfloat16, case.hidden)
    assert relative_error(module(*arguments), expected(case, *arguments)) < 1e-2


@pytest.mark.parametrize("tokens", [0, 1, 6])
@pytest.mark.parametrize("provider", [CpuProvider(), TorchProvider()], ids=["cpu", "torch"])
def test_experts_of_other_ranks_add_nothing(provider: KernelProvider, tokens: int) -> None:
    case = Experts(layer_bias=True)
    module = case.module(provider)
    x, index, weights = run(module, tokens, 2, torch.float32, case.hidden)
    index[::2, 0] = case.count
    index[1::3, 1] = case.count + 5
    index[2::4, 1] = -1
    out = module(x, index, weights)
    assert out.shape == x.shape
    if tokens:
        assert relative_error(out, expected(case, x, index, weights)) < 3e-6


@pytest.mark.parametrize("case", CASES, ids=str)
def test_checkpoint_tensors_come_back(case: Experts) -> None:
    stored = case.tensors()
    module = build(case, case.tensors(), CpuProvider(), "cpu", torch.bfloat16)
    module.bind("cpu", torch.bfloat16)
    assert not list(module.children()) or case.norm
    assert_restored(module, stored)


def gate_changed(case: Experts, **changes: Any) -> list[dict[str, tuple[Shape, GptqTensors]]]:
    """Tensors of which one expert's gate is like no other projection."""
    tensors = case.tensors()
    shape, gate = tensors[1]["gate_proj"]
    tensors[1]["gate_proj"] = (shape, replace(gate, **changes))
    return tensors


@pytest.mark.parametrize("case", JOINED.values(), ids=JOINED.keys())
def test_gate_and_up_that_are_alike_are_one_projection(case: Experts) -> None:
    module = case.module(CpuProvider())
    module.bind("cpu", torch.float32)
    assert module.tensors["packed_gate_up_proj_scales"].shape[-1] == 2 * case.inner
    assert not any(name.startswith(("packed_gate_proj", "packed_up_proj")) for name in module.packed())


APART = {
    "act-order of their own": Experts(inner=64, order="apart").tensors(),
    "act-order of one expert": gate_changed(Experts(inner=64), g_idx=torch.arange(64, dtype=torch.int32) // 32),
    "outputs that fill no block": Experts(inner=48).tensors(),
}


@pytest.mark.parametrize("tensors", APART.values(), ids=APART.keys())
def test_gate_and_up_that_differ_stay_apart(tensors: list[dict[str, tuple[Shape, GptqTensors]]]) -> None:
    module = build(Experts(), tensors, CpuProvider(), "cpu", torch.float32)
    stored = [dict(projections) for projections in tensors]
    module.bind("cpu", torch.float32)
    assert {"packed_gate_proj_codes", "packed_up_proj_codes"} <= module.packed().keys()
    assert_restored(module, stored)


def test_joined_tensors_keep_dtypes_of_their_own() -> None:
    case = Experts(inner=64)
    gate = case.tensors()[1]["gate_proj"][1]
    changes = {"scales": gate.scales.float() / 3, "g_idx": gate.g_idx.long()}
    module = build(case, gate_changed(case, **changes), CpuProvider(), "cpu", torch.float32)
    module.bind("cpu", torch.float32)
    assert "packed_gate_up_proj_codes" in module.packed()
    assert_restored(module, gate_changed(case, **changes))


def test_uneven_groups_and_dtypes_of_their_own() -> None:
    """One expert's groups lie unevenly, another stores its scales and g_idx in other dtypes."""
    case = Experts(hidden=128, group=64)
    tensors, reference = case.tensors(), case.tensors()
    for made in (tensors, reference):
        shape, gate = made[1]["gate_proj"]
        uneven = torch.repeat_interleave(torch.tensor([40, 88]))[torch.randperm(128, generator=torch.Generator())]
        made[1]["gate_proj"] = (shape, replace(gate, g_idx=uneven.to(torch.int64), scales=gate.scales.float()))
    module = build(case, tensors, CpuProvider(), "cpu", torch.float32)
    arguments = run(module, 5, 2, torch.float32, case.hidden)
    wanted = build(case, reference, TorchProvider(), "cpu", torch.float32)(*arguments)
    assert relative_error(module(*arguments), wanted) < 3e-6
    found = module.checkpoint_tensors("gate_proj", 1)
    assert found.g_idx.dtype == torch.int64
    assert found.scales.equal(reference[1]["gate_proj"][1].scales)
    assert found.qweight.equal(reference[1]["gate_proj"][1].qweight)


@pytest.mark.parametrize("inner", [48, 64], ids=["apart", "joined"])
def test_gradient(inner: int) -> None:
    case = Experts(inner=inner, layer_bias=True, sym=False)
    module = case.module(CpuProvider())
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


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("inner", [48, 64], ids=["apart", "joined"])
def test_compiles_into_one_graph_without_an_eager_call(inner: int, dynamic: bool) -> None:
    torch._dynamo.reset()
    case = Experts(inner=inner, layer_bias=True)
    module = case.module(CpuProvider())
    module.bind("cpu", torch.float32)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (3, 5):
        arguments = run(module, tokens, 2, torch.float32, case.hidden)
        assert relative_error(compiled(*arguments), expected(case, *arguments, module)) < 3e-6


def test_experts_that_are_packed_differently_run_one_by_one() -> None:
    case = Experts()
    tensors = case.tensors()
    tensors[0]["up_proj"] = replace(case, bits=8).tensors()[0]["up_proj"]
    module = build(case, tensors, CpuProvider(), "cpu", torch.float32)
    request = Request(module.spec, "cpu", torch.float32)
    verdict = CpuProvider().experts.judge(request)
    assert isinstance(verdict, Rejected)
    assert verdict.reason == "the experts' up_proj differ in bits"
    assert choose_kernel(request).provider.name == "torch"
    assert choose_kernel(Request(case.module(CpuProvider()).spec, "cpu", torch.float32)).provider.name == "cpu"
