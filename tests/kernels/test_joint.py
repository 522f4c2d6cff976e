"""Layers that share their input are multiplied in one, and stay what they are for everybody who looks at them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.projections import Shape, expected, make, relative_error

from graftq.quant_linear.gpu.provider import TritonProvider
from graftq.quant_linear.gpu.siblings import join_siblings
from graftq.quant_linear.layouts import GptqTensors
from graftq.quant_linear.linear import QuantLinear
from graftq.quant_linear.selection import Selection

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")

WIDTHS = (256, 128, 128)
CASES = {
    "symmetric": Shape(),
    "act-order": Shape(act_order=True),
    "asymmetric with bias": Shape(sym=False, bias=True),
    "3 bits in units": Shape(bits=3, group=48, k=320, act_order=True, sym=False),
    "8 bits in one group": Shape(bits=8, group=-1),
}


def build(shape: Shape, device: str) -> tuple[list[QuantLinear], list[GptqTensors]]:
    """Layers of :data:`WIDTHS` outputs with one act-order, bound, and what they were made of."""
    layers, stored = [], []
    for seed, n in enumerate(WIDTHS):
        own = replace(shape, n=n)
        tensors = make(own, seed, device)
        if stored and shape.act_order:
            tensors = replace(tensors, g_idx=stored[0].g_idx.clone())
        layer = QuantLinear.from_tensors(own.spec(), tensors, lambda _: Selection(TritonProvider(), {}), torch.float16)
        layer.bind(device, torch.float16)
        layers.append(layer)
        stored.append(tensors)
    return layers, stored


def check(layers: list[QuantLinear], stored: list[GptqTensors], x: torch.Tensor, *others: torch.Tensor) -> None:
    """Hold what the layers return, for ``x`` or for ``others`` from the second layer on, against the reference."""
    for layer, tensors, each in zip(layers, stored, (x, *(others or (x, x))), strict=False):
        assert relative_error(layer(each), expected(each, tensors, layer.spec)) < 2e-3


def multiplies_in_one(layers: list[QuantLinear]) -> bool:
    return all(layer.shared is not None for layer in layers)


@pytest.mark.parametrize("case", CASES)
def test_the_product(case: str, device: str):
    layers, stored = build(CASES[case], device)
    assert join_siblings(layers)
    with torch.no_grad():
        for m in (1, 3, 1, 1100):
            check(layers, stored, torch.randn(m, CASES[case].k, device=device).half())
    assert multiplies_in_one(layers)


@pytest.mark.parametrize("case", CASES)
def test_one_by_one_while_gradients_are_recorded(case: str, device: str):
    layers, stored = build(CASES[case], device)
    join_siblings(layers)
    for m in (1, 1100):
        check(layers, stored, torch.randn(m, CASES[case].k, device=device).half())
    assert multiplies_in_one(layers)


@pytest.mark.parametrize("case", CASES)
def test_the_stored_tensors_come_back(case: str, device: str):
    layers, stored = build(CASES[case], device)
    join_siblings(layers)
    for layer, tensors in zip(layers, stored, strict=True):
        for name, tensor in vars(layer.checkpoint_tensors()).items():
            original = getattr(tensors, name)
            assert (tensor is None) == (original is None), name
            if tensor is not None:
                assert torch.equal(tensor, original), name
                assert tensor.is_contiguous()
                assert tensor.untyped_storage().nbytes() == tensor.nbytes  # files take no part of another's memory


def test_different_inputs_part_them(device: str, caplog: pytest.LogCaptureFixture):
    layers, stored = build(CASES["act-order"], device)
    join_siblings(layers)
    x, y = (torch.randn(2, 256, device=device).half() for _ in range(2))
    with torch.no_grad(), caplog.at_level("DEBUG", "graftq"):
        check(layers, stored, x, y, y)
        assert not multiplies_in_one(layers)
        assert [record.name for record in caplog.records] == ["graftq.quant_linear.gpu.siblings"]
        check(layers, stored, x)


def test_an_input_without_numbers_does_not_part_them(device: str):
    layers, _ = build(CASES["symmetric"], device)
    join_siblings(layers)
    x = torch.full((2, 256), float("nan"), device=device, dtype=torch.float16)
    with torch.no_grad():
        assert all(layer(x).isnan().all() for layer in layers)
    assert multiplies_in_one(layers)


def test_a_changed_input_parts_them(device: str):
    layers, stored = build(CASES["symmetric"], device)
    join_siblings(layers)
    x = torch.randn(2, 256, device=device).half()
    with torch.no_grad():
        check(layers[:1], stored[:1], x)
        x.mul_(2)
        check(layers[1:], stored[1:], x, x)
    assert not multiplies_in_one(layers)


def change(x: torch.Tensor) -> None:
    x.mul_(0.5)


def change_unseen(x: torch.Tensor) -> None:
    x.data.mul_(0.5)


HOOKS: dict[str, Callable[[QuantLinear], object]] = {
    "before, in place": lambda layer: layer.register_forward_pre_hook(lambda _, args: change(args[0])),
    "before, unseen": lambda layer: layer.register_forward_pre_hook(lambda _, args: change_unseen(args[0])),
    "before, another": lambda layer: layer.register_forward_pre_hook(lambda _, args: (args[0] * 0.5,)),
    "after, to the input": lambda layer: layer.register_forward_hook(lambda _, args, out: change_unseen(args[0])),
    "after, in place": lambda layer: layer.register_forward_hook(lambda _, args, out: out.mul_(2)),
    "after, keyword": lambda layer: layer.register_forward_hook(lambda _, a, k, out: out * 2, with_kwargs=True),
    "instead": lambda layer: setattr(layer, "forward", lambda x: QuantLinear.forward(layer, x.mul_(0.5))),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_see_and_change_what_they_would(hook: str, place: int, mode: Any, device: str):
    layers, _ = build(CASES["symmetric"], device)
    lone, _ = build(CASES["symmetric"], device)
    join_siblings(layers)
    with mode():
        each = torch.randn(1, 256, device=device).half()
        assert all(layer(each) is not None for layer in layers)
        HOOKS[hook](layers[place])
        HOOKS[hook](lone[place])
        x = torch.randn(1, 256, device=device).half()
        y = x.clone()
        assert all(relative_error(one(x), other(y)) < 2e-3 for one, other in zip(layers, lone, strict=True))
        assert x.equal(y)


def test_a_change_in_place_once_they_are_proven(device: str):
    layers, stored = build(CASES["symmetric"], device)
    join_siblings(layers)
    with torch.no_grad():
        check(layers, stored, x := torch.randn(2, 256, device=device).half())
        check(layers[:1], stored[:1], x)
        x.mul_(2)
        check(layers[1:], stored[1:], x, x)
    assert not multiplies_in_one(layers)


@pytest.mark.parametrize("first", [1, 2])
def test_another_order_of_calls_parts_them(first: int, device: str):
    layers, stored = build(CASES["symmetric"], device)
    join_siblings(layers)
    with torch.no_grad():
        check(
            layers[first:] + layers[:first], stored[first:] + stored[:first], torch.randn(2, 256, device=device).half()
        )


def test_moving_one_parts_them(device: str):
    layers, stored = build(CASES["act-order"], device)
    join_siblings(layers)
    layers[1].to(device).to(torch.bfloat16).half()  # nothing moves, and packed tensors are not cast
    assert multiplies_in_one(layers)
    layers[1]._apply(torch.clone)
    assert not multiplies_in_one(layers)
    with torch.no_grad():
        assert (
            relative_error(
                layers[0](x := torch.randn(2, 256, device=device).half()), expected(x, stored[0], layers[0].spec)
            )
            < 2e-3
        )


def test_a_layer_that_gives_its_tensors_away_leaves_the_others_theirs(device: str):
    layers, stored = build(CASES["act-order"], device)
    join_siblings(layers)
    layers[0].release()
    with torch.no_grad():
        check(layers[1:], stored[1:], x := torch.randn(2, 256, device=device).half(), x)


UNLIKE = {
    "bits": replace(CASES["symmetric"], bits=8),
    "groups": replace(CASES["symmetric"], group=64),
    "symmetry": replace(CASES["symmetric"], sym=False),
    "bias": replace(CASES["symmetric"], bias=True),
    "act-order": replace(CASES["symmetric"], act_order=True),
    "scales": replace(CASES["symmetric"], scales=torch.float32),
}


@pytest.mark.parametrize("difference", UNLIKE)
def test_layers_that_differ_are_left_alone(difference: str, device: str):
    layers = [build(shape, device)[0][0] for shape in (CASES["symmetric"], UNLIKE[difference])]
    assert not join_siblings(layers)
    assert not any(layer.shared for layer in layers)


@pytest.mark.parametrize("proven", [True, False], ids=["after an eager call", "before any"])
def test_one_product_in_a_compiled_graph(proven: bool, device: str):
    layers, stored = build(CASES["act-order"], device)
    join_siblings(layers)
    products = []

    def backend(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        products.extend(node for node in graph.graph.nodes if "tiled_linear" in str(node.target))
        return graph

    compiled = torch.compile(lambda x: torch.cat([layer(x) for layer in layers], -1), backend=backend, fullgraph=True)
    if proven:
        with torch.no_grad():
            check(layers, stored, torch.randn(3, 256, device=device).half())
    x = torch.randn(3, 256, device=device).half()
    with torch.no_grad():
        wanted = torch.cat(
            [expected(x, *each) for each in zip(stored, (layer.spec for layer in layers), strict=True)], -1
        )
        for _ in range(2):
            assert relative_error(compiled(x), wanted) < 2e-3
    assert len(products) == (1 if proven else len(layers))
    assert multiplies_in_one(layers)


def test_a_hook_in_a_compiled_graph(device: str):
    layers, stored = build(CASES["symmetric"], device)
    join_siblings(layers)
    with torch.no_grad():
        check(layers, stored, torch.randn(3, 256, device=device).half())
        layers[2].register_forward_pre_hook(lambda _, args: change(args[0]))
        x = torch.randn(3, 256, device=device).half()
        wanted = [
            expected(x * (0.5 if place == 2 else 1), each, layers[place].spec) for place, each in enumerate(stored)
        ]
        compiled = torch.compile(lambda x: torch.cat([layer(x) for layer in layers], -1), backend="eager")
        assert relative_error(compiled(x), torch.cat(wanted, -1)) < 2e-3
