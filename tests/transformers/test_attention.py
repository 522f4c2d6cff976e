"""Compiled steps of packed models keep the heads of keys and values grouped; all other attention is as before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.loading import load
from support.models import relative_error
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from graftq.adapters.transformers import attention

SDPA = torch.nn.functional.scaled_dot_product_attention


@pytest.fixture
def grouped(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Within compiled code: how each call of SDPA is made."""
    calls: list[bool] = []

    def sdpa(*args: Any, enable_gqa: bool = False, **kwargs: Any) -> torch.Tensor:
        calls.append(enable_gqa)
        return SDPA(*args, enable_gqa=enable_gqa, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", sdpa)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    return calls


@pytest.fixture(scope="module")
def model(originals: dict[str, Path]) -> Any:
    return load(originals["llama"])


def attend(module: torch.nn.Module, sequences: int = 4, tokens: int = 1, with_mask: bool = True, **more: Any) -> Any:
    """Attention of four heads over two, by transformers' own function and by ours."""
    query = torch.randn(sequences, 4, tokens, 16)
    key, value = torch.randn(2, sequences, 2, 9, 16)
    mask = torch.rand(sequences, 1, tokens, 9) < 0.8 if with_mask else None
    if mask is not None:
        mask[..., 0] = True
    function = ALL_ATTENTION_FUNCTIONS["sdpa"]
    return [call(module, query, key, value, mask, scaling=0.3, **more)[0] for call in (function.__wrapped__, function)]


def module_of(model: Any) -> torch.nn.Module:
    return next(module for module in model.modules() if getattr(module, "num_key_value_groups", 1) > 1)


CASES: dict[str, tuple[dict[str, Any], bool]] = {
    "a step": ({}, True),
    "many sequences": ({"sequences": 33}, True),
    "one sequence": ({"sequences": 1}, True),
    "several tokens": ({"tokens": 3}, False),
    "no mask": ({"with_mask": False}, True),  # transformers groups these itself
}


@pytest.mark.parametrize(("arguments", "expected"), CASES.values(), ids=CASES)
def test_grouped(
    arguments: dict[str, Any], expected: bool, model: Any, grouped: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = module_of(model)
    monkeypatch.setattr(module, attention._VERDICT, True)
    stock, ours = attend(module, **arguments)
    assert grouped[-1] == expected
    assert relative_error(ours, stock) < 1e-6


def test_other_models_are_as_before(originals: dict[str, Path], grouped: list[bool]) -> None:
    plain = AutoModelForCausalLM.from_pretrained(originals["llama"].parent / "float")
    stock, ours = attend(module_of(plain))
    assert torch.equal(stock, ours)
    assert not any(grouped)


def test_refused_by_the_user(originals: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFORMERS_SDPA_FORCE_GQA", "0")
    assert not hasattr(module_of(load(originals["llama"])), attention._VERDICT)


def test_without_a_verdict(model: Any, grouped: list[bool]) -> None:
    """Compiled before any other call: cuDNN could not be asked."""
    stock, ours = attend(module_of(model))
    assert torch.equal(stock, ours)
    assert not any(grouped)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_compiled_steps(name: str, originals: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph, with the verdict of the call before it, and the values of the stock step."""
    model = load(originals[name])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    ids = torch.randint(3, 90, (5, 6))
    mask = torch.ones(5, 7, dtype=torch.long)
    mask[0, :2] = 0

    def step(call: Callable[..., Any]) -> torch.Tensor:
        with torch.no_grad():
            past = model(ids, attention_mask=mask[:, :6], use_cache=True).past_key_values
            return call(ids[:, :1], attention_mask=mask, past_key_values=past).logits

    expected = step(compiled)
    monkeypatch.setattr(attention, "_look", lambda module, *_: setattr(module, attention._VERDICT, True))
    torch.compiler.reset()
    found = step(compiled)
    assert relative_error(found, expected) < 1e-5


def test_a_cpu_is_not_asked(model: Any) -> None:
    with torch.no_grad():
        model(torch.tensor([[3, 4, 5]]))
    assert getattr(module_of(model), attention._VERDICT) is False
