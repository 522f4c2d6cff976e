"""Kernels that are compiled when a model is loaded, for those who ask for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.loading import load
from support.models import logits
from transformers import AutoModelForCausalLM

from graftq.adapters.transformers import warmup
from graftq.quant_linear.gpu.warmup import compile_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_every_kind_of_call_is_gone_through(originals: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers are called with any number of tokens, as the model calls them, and compute afterwards as before."""
    model = load(originals["mixtral"], dtype=torch.float16 if DEVICE == "cuda" else torch.float32).to(DEVICE)
    before = logits(model)
    widths = []

    def compiled(module: Any, call: Any, tokens: int) -> int:
        widths.append((type(module).__name__, *call(tokens).shape))
        return compile_kernels(module, call, tokens)

    monkeypatch.setattr(warmup, "compile_kernels", compiled)
    assert (warmup.warm_up(model, 5) > 0) == (DEVICE == "cuda")
    hidden = model.config.hidden_size
    assert ("QuantExperts", 5, hidden) in widths
    assert ("QuantLinear", 5, hidden) in widths  # o_proj, and on a GPU q, k and v in one
    assert logits(model).equal(before)


@pytest.mark.parametrize(("value", "expected"), [("", []), ("0", []), ("300", [300])])
def test_asked_for_in_the_environment(
    value: str, expected: list[int], originals: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(warmup, "warm_up", lambda model, tokens: asked.append(tokens))
    monkeypatch.setenv("GRAFTQ_WARM_UP", value)
    load(originals["llama"])
    assert asked == expected


def test_other_models_are_not_run(originals: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warmup, "warm_up", lambda *_: pytest.fail("run"))
    monkeypatch.setenv("GRAFTQ_WARM_UP", "300")
    AutoModelForCausalLM.from_pretrained(originals["llama"].parent / "float")


def test_what_cannot_be_run_is_loaded_all_the_same(
    originals: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(warmup, "_calls", lambda _: 1 // 0)
    monkeypatch.setenv("GRAFTQ_WARM_UP", "300")
    load(originals["llama"])
    assert "GRAFTQ_WARM_UP: kernels are compiled when they are first needed" in caplog.text


def test_a_value_that_is_no_number(originals: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFTQ_WARM_UP", "all")
    with pytest.raises(ValueError, match="GRAFTQ_WARM_UP=all"):
        load(originals["llama"])
