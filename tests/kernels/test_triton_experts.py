"""The fused experts against the reference's loop in float32: a GPU runs the full grid, the interpreter a part."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle, product
from pathlib import Path

import pytest
import torch
from support.experts import ORDERS, STYLES, Experts, build, expected, rebuilt, routing
from support.projections import relative_error

from graftq.quant_linear.experts_spec import ExpertsSpec
from graftq.quant_linear.gpu.provider import TritonProvider
from graftq.quant_linear.reference import TorchProvider
from graftq.quant_linear.selection import Accepted, Rejected, Request, Verdict

# Triton's interpreter turns one-element arrays into numbers, which numpy deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")

LIMIT = {torch.float16: 3e-3, torch.bfloat16: 2e-2}
FULL = torch.cuda.is_available()
# The interpreter does not know bfloat16 arithmetic.
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16] if FULL else [torch.float16], ids=str)


def check(
    case: Experts,
    device: str,
    tokens: tuple[int, ...] = (1, 3),
    top_k: int = 2,
    dtype: torch.dtype = torch.float16,
    index: torch.Tensor | None = None,
    size: float = 1.0,
) -> None:
    """Run ``case`` fused and by the reference; ``index`` overrides the random routing of a single run."""
    module = case.module(TritonProvider(), device, dtype)
    for count in tokens:
        chosen, weights = routing(count, top_k, case.count, seed=count, device=device)
        chosen = chosen if index is None else index.to(device)
        x = (torch.randn(count, case.hidden, device=device) * size).to(dtype)
        out = module(x, chosen, weights)
        reference = expected(case, x, chosen, weights, module)
        assert (out.dtype, out.shape) == (dtype, reference.shape)
        if reference.any():
            assert relative_error(out, reference) < LIMIT[dtype]
        else:
            assert not out.any()


def grid() -> Iterator[Experts]:
    """Every combination on a GPU; elsewhere every width with every kind of group, the rest in turn."""
    groups = (-1, 16, 32, 64, 128, 48) if FULL else (-1, 32, 128, 48)
    sizes = ((512, 384), (160, 144)) if FULL else ((160, 48),)
    rest = list(product(ORDERS, (True, False)))
    turn = cycle(rest)
    for bits, group, (hidden, inner) in product((2, 3, 4, 8), groups, sizes):
        for order, sym in rest if FULL else [next(turn)]:
            yield Experts(
                count=8 if FULL else 2, hidden=hidden, inner=inner, bits=bits, group=group, order=order, sym=sym
            )


@DTYPES
@pytest.mark.parametrize("case", list(grid()), ids=str)
def test_grid(case: Experts, dtype: torch.dtype, device: str):
    check(case, device, (1, 3, 20, 70, 300, 1100) if FULL else (1, 2), dtype=dtype)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu", "relu2", "swiglu_oai", "unknown"])
def test_activations(activation: str, device: str):
    check(Experts(count=2, activation=activation), device, (1, 2))


@pytest.mark.parametrize("activation", ["silu", "unknown"])
@pytest.mark.parametrize("concatenated", [True, False], ids=["concatenated", "interleaved"])
@pytest.mark.parametrize("style", STYLES)
def test_names(style: str, concatenated: bool, activation: str, device: str):
    if style == "up" and not concatenated:
        pytest.skip("no gate to interleave")
    case = Experts(count=2, style=style, concatenated=concatenated, activation=activation, bias=True)
    check(case, device, (1, 20) if FULL else (2,))


@pytest.mark.parametrize("activation", ["silu", "unknown"])
@pytest.mark.parametrize("bias", [False, True], ids=["layer's bias", "both biases"])
@pytest.mark.parametrize("order", ["all", "apart"])
def test_biases_of_the_layer(order: str, bias: bool, activation: str, device: str):
    case = Experts(count=2, order=order, bias=bias, layer_bias=True, activation=activation)
    check(case, device, (1, 3) if activation == "silu" and order == "all" else (2,))


def test_groups_of_uneven_length_in_one_expert(device: str):
    case = Experts(count=2, hidden=128)
    tensors = case.tensors(device)
    uneven = torch.tensor([0] * 70 + [1] + [3] * 57, dtype=torch.int32, device=device)[torch.randperm(128)]
    for name in ("gate_proj", "up_proj"):
        shape, stored = tensors[1][name]
        tensors[1][name] = (shape, replace(stored, g_idx=uneven))
    index, weights = routing(2, 2, 2, device=device)
    x = torch.randn(2, 128, device=device).half()
    found = build(case, tensors, TritonProvider(), device, torch.float16)(x, index, weights)
    reference = build(case, tensors, TorchProvider(), device, torch.float32)(x.float(), index, weights)
    assert relative_error(found, reference) < LIMIT[torch.float16]


def test_a_norm_after_each_expert(device: str):
    check(Experts(count=2, norm=True), device, (2,))


@pytest.mark.parametrize("tokens", [0, 1, 2, 15, 33, 130, 1000, 4097, 16384] if FULL else [0, 1, 33])
def test_tokens(tokens: int, device: str):
    check(Experts(count=8 if FULL else 2, hidden=128), device, (tokens,), top_k=2 if FULL else 1)


def test_more_tokens_than_go_through_at_once(device: str, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("triton")
    monkeypatch.setattr("graftq.quant_linear.gpu.experts.ops.TOKENS_AT_ONCE", 2)
    check(Experts(count=2), device, (5,), top_k=1)


@pytest.mark.parametrize("top_k", [1, 2, 3, 8, 16] if FULL else [1, 3])
@pytest.mark.parametrize("count", [2, 3, 17, 512] if FULL else [3])
def test_experts_and_choices(count: int, top_k: int, device: str):
    if top_k <= count:
        check(Experts(count=count), device, (1, 5, 100) if FULL else (1,), top_k=top_k)


@pytest.mark.parametrize("tokens", [1, 2, 300] if FULL else [1, 2])
def test_all_tokens_on_one_expert(tokens: int, device: str):
    check(Experts(), device, (tokens,), top_k=1, index=torch.full((tokens, 1), 2))


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "bare"])
@pytest.mark.parametrize("index", [[[3, 1]], [[3, 3]], [[3, 0], [2, 3], [4, 7]]], ids=str)
def test_experts_of_other_ranks_add_nothing(index: list[list[int]], fused: bool, device: str):
    case = Experts(activation="silu" if fused else "unknown", bias=True)
    check(case, device, (len(index),), index=torch.tensor(index))


@DTYPES
@pytest.mark.parametrize("scales", [torch.bfloat16, torch.float32], ids=str)
def test_scales_in_any_dtype(scales: torch.dtype, dtype: torch.dtype, device: str):
    check(Experts(count=2, group=-1, scales=scales, bias=True), device, (1, 2), dtype=dtype)


@pytest.mark.parametrize(("hidden", "inner", "style"), [(1024, 32, "gate and up"), (64, 1024, "up")])
@pytest.mark.parametrize("tokens", [1, 2])
def test_splits_of_the_inputs(tokens: int, hidden: int, inner: int, style: str, device: str):
    case = Experts(count=2, hidden=hidden, inner=inner, style=style, group=128, order="none", layer_bias=True)
    check(case, device, (tokens,), top_k=1)


@pytest.mark.parametrize(("scale", "size"), [(1e-4, 1e4), (1.0, 1e-3)])
def test_extreme_scales_and_activations(scale: float, size: float, device: str):
    check(Experts(count=2, style="up", activation="relu", scale=scale), device, (1, 2), size=size)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_scales_of_both_signs(bits: int, device: str):
    """As graftq makes them."""
    check(Experts(count=2, bits=bits, scale=-0.02), device, (1, 5))


@pytest.mark.parametrize("view", ["transposed", "sliced", "int32"])
def test_any_strides_and_integers(view: str, device: str):
    case = Experts(count=2)
    module = case.module(TritonProvider(), device, torch.float16)
    index, weights = routing(3, 2, 2, device=device)
    x = torch.randn(3, 64, device=device).half()
    if view == "transposed":
        x, index, weights = (tensor.T.contiguous().T for tensor in (x, index, weights))
    elif view == "sliced":
        x = torch.randn(3, 100, device=device).half()[:, 7:71]
    else:
        index, weights = index.int(), weights.half()
    assert relative_error(module(x, index, weights), expected(case, x, index, weights)) < LIMIT[torch.float16]


@pytest.mark.parametrize("order", ["all", "apart"])
def test_gradients_to_activations_and_routing_weights(order: str, device: str):
    """fp16 against float32: the reference's own backward through dequantized weights."""
    case = Experts(order=order, sym=False, layer_bias=True)
    module = case.module(TritonProvider(), device, torch.float16)
    index, weights = routing(5, 2, 3, device=device)
    index[0, 0] = 3  # another rank's
    x, grad = torch.randn(2, 5, 64, device=device).half()
    found = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
    module(found[0], index, found[1]).backward(grad)
    wanted = [x.float().requires_grad_(), weights.clone().requires_grad_()]
    expected(case, wanted[0], index, wanted[1]).backward(grad.float())
    for mine, reference in zip(found, wanted, strict=True):
        assert mine.grad is not None
        assert reference.grad is not None
        assert relative_error(mine.grad, reference.grad.double()) < 5e-3


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own
@pytest.mark.parametrize("learns", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("activation", ["silu", "unknown"])
def test_compiles_to_one_graph(activation: str, learns: bool, device: str):
    case = Experts(count=2, activation=activation, layer_bias=True)
    module = case.module(TritonProvider(), device, torch.float16)
    index, weights = routing(2, 2, 2, device=device)
    x = torch.randn(2, 64, device=device).half().requires_grad_(learns)
    module.bind(device, torch.float16)
    compiled = torch.compile(
        lambda x: module(x * 2, index, weights) + 1, fullgraph=True, backend="inductor" if FULL else "aot_eager"
    )
    out = compiled(x)
    reference = expected(case, x.detach() * 2, index, weights) + 1
    assert relative_error(out.detach(), reference) < LIMIT[torch.float16]
    if learns:
        out.sum().backward()
        assert x.grad is not None


@pytest.mark.parametrize("tokens", [1, 2, 16, 100, 1500])
def test_graph_capture_and_repeatable_bits(tokens: int, gpu: str):
    case = Experts(count=16, hidden=2048, inner=768, group=128)
    module = case.module(TritonProvider(), gpu, torch.float16)
    index, weights = routing(tokens, 4, 16, device=gpu)
    x = torch.randn(tokens, 2048, device=gpu).half()
    eager = module(x, index, weights)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = module(x, index, weights)
    for _ in range(20):
        captured.fill_(float("nan"))
        graph.replay()
        assert torch.equal(captured, eager)
    index.copy_(routing(tokens, 4, 16, seed=1, device=gpu)[0])  # another routing, the same graph
    graph.replay()
    assert torch.equal(captured, module(x, index, weights))
    assert relative_error(captured, expected(case, x, index, weights)) < LIMIT[x.dtype]


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@pytest.mark.parametrize("activation", ["silu", "unknown"])
def test_no_host_synchronization(activation: str, gpu: str):
    case = Experts(hidden=512, inner=256, activation=activation)
    module = case.module(TritonProvider(), gpu, torch.float16)
    runs = [(torch.randn(tokens, 512, device=gpu).half(), *routing(tokens, 2, 3, device=gpu)) for tokens in (1, 5, 500)]
    for run in runs:
        module(*run)  # compiles, and sets up the counters
    torch.cuda.set_sync_debug_mode("error")
    try:
        for run in runs:
            module(*run)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_experts_of_a_real_checkpoint(device: str):
    from transformers import AutoModelForCausalLM

    checkpoint = Path(__file__).parents[2] / "examples" / "tiny-mixtral-gptq"
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    for layer in model.model.layers if FULL else model.model.layers[:1]:
        reference = layer.mlp.experts
        module = rebuilt(reference, TritonProvider(), device, torch.float16)
        for tokens in (1, 2, 40, 500) if FULL else (1,):
            index, weights = routing(tokens, 2, 8)
            x = torch.randn(tokens, 256)
            out = module(x.half().to(device), index.to(device), weights.to(device)).cpu()
            assert relative_error(out, reference(x.half().float(), index, weights)) < LIMIT[torch.float16]


def test_back_to_the_checkpoints_tensors(device: str):
    case = Experts(sym=False, bias=True)
    module = case.module(TritonProvider(), device, torch.float16)
    module.bind(device, torch.float16)
    for expert, made in enumerate(case.tensors(device)):
        for name, (_, stored) in made.items():
            restored = module.checkpoint_tensors(name, expert)
            assert all(
                torch.equal(getattr(restored, field), tensor)
                for field, tensor in vars(stored).items()
                if tensor is not None
            )


def test_half_of_the_experts_elsewhere(device: str):
    """Expert parallelism: two ranks of two experts each add up to the four."""
    whole = Experts(count=4)
    tensors = whole.tensors(device)
    index, weights = routing(3, 2, 4, device=device)
    x = torch.randn(3, 64, device=device).half()
    total = torch.zeros(3, 64, device=device)
    for rank in range(2):
        module = build(
            replace(whole, count=2), tensors[2 * rank : 2 * rank + 2], TritonProvider(), device, torch.float16
        )
        local = torch.where(index // 2 == rank, index - 2 * rank, 2)
        total += module(x, local, weights).float()
    assert relative_error(total, expected(whole, x, index, weights)) < LIMIT[torch.float16]


def verdict(spec: ExpertsSpec, device: str = "cuda", dtype: torch.dtype = torch.float16) -> Verdict:
    return TritonProvider().experts.judge(Request(spec, device, dtype))


def test_experts_of_one_kind_are_accepted_on_gpus_alone():
    spec = Experts().module(TritonProvider()).spec
    assert verdict(spec) == Accepted()
    assert verdict(spec, "xpu", torch.bfloat16) == Accepted()
    assert isinstance(verdict(spec, "cpu"), Rejected)
    assert isinstance(verdict(spec, dtype=torch.float32), Rejected)


@pytest.mark.parametrize("name", ["up_proj", "down_proj"])
def test_experts_that_differ_are_refused_with_the_reason(name: str):
    spec = Experts().module(TritonProvider()).spec
    changed = tuple(
        (other, (replace(specs[0], bits=8), *specs[1:]) if other == name else specs)
        for other, specs in spec.projections
    )
    refusal = verdict(replace(spec, projections=changed))
    assert isinstance(refusal, Rejected)
    assert name in refusal.reason
    assert refusal.reason.endswith("in bits")
    reordered = tuple((other, (replace(specs[0], desc_act=False), *specs[1:])) for other, specs in spec.projections)
    assert verdict(replace(spec, projections=reordered)) == Accepted()


def test_the_provider_is_registered():
    from graftq.plugin.manager import kernel_providers

    assert [provider.name for provider in kernel_providers() if isinstance(provider, TritonProvider)] == ["triton"]
