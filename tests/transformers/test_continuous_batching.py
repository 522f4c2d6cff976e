"""What a packed model's continuous batching says about its settings."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.loading import load
from transformers import ContinuousBatchingConfig
from transformers.generation.continuous_batching import continuous_api

from graftq.adapters import transformers as adapter
from graftq.adapters.transformers import continuous_batching

CASES: dict[str, tuple[dict[str, Any], bool]] = {
    "nothing said": ({}, True),
    "defaults": ({"config": ContinuousBatchingConfig()}, True),
    "graphs": ({"config": ContinuousBatchingConfig(use_cuda_graph=True)}, False),
    "no graphs": ({"config": ContinuousBatchingConfig(use_cuda_graph=False)}, False),
    "flash attention": ({"attention": "paged|flash_attention_2"}, False),
    "CPU": ({"device": "cpu"}, False),
    "not packed": ({"packed": False}, False),
}


@pytest.mark.parametrize(("case", "expected"), CASES.values(), ids=CASES)
def test_one_line(
    case: dict[str, Any],
    expected: bool,
    originals: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(continuous_batching, "_said", set())
    given: list[Any] = []
    init = continuous_batching._look_at_settings(lambda self, *arguments, **_: given.append(arguments))
    model = SimpleNamespace(
        config=SimpleNamespace(_attn_implementation=case.get("attention", "sdpa")),
        device=torch.device(case.get("device", "cuda")),
        hf_quantizer=load(originals["llama"]).hf_quantizer if case.get("packed", True) else None,
    )
    with caplog.at_level(logging.INFO, "graftq"):
        for _ in range(2):
            init(model, None, case.get("config"))
    assert caplog.text.count("use_cuda_graph=True") == expected
    assert given == [(None, case.get("config"))] * 2


def test_taken_over() -> None:
    init = continuous_api.ContinuousMixin.init_continuous_batching
    assert init.__globals__ is vars(continuous_batching)


def test_transformers_4_generates_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its continuous batching takes other arguments, and our quantizer for 5 cannot be imported there."""
    monkeypatch.setattr(adapter, "_version", lambda: (4, 57))
    seams = adapter.graftq_seams("transformers") or {}
    assert sorted(seams) == ["transformers.modeling_utils", "transformers.quantizers.auto"]
