"""What a packed model's continuous batching attends with, and what it says about its settings."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.checkpoints import write_pair
from support.gptq import Recipe
from support.loading import load
from support.models import tiny
from support.processes import run
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching import continuous_api

from graftq.adapters import transformers as adapter
from graftq.adapters.transformers import continuous_batching, paged_attention

ROOT = Path(__file__).parents[2]
CASES: dict[str, tuple[dict[str, Any], bool]] = {
    "nothing said": ({}, True),
    "defaults": ({"config": ContinuousBatchingConfig()}, True),
    "graphs": ({"config": ContinuousBatchingConfig(use_cuda_graph=True)}, False),
    "no graphs": ({"config": ContinuousBatchingConfig(use_cuda_graph=False)}, False),
    "flash attention": ({"attention": "paged|flash_attention_2"}, False),
    "torch's flash attention": ({"flash": True}, False),
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
    monkeypatch.setattr(paged_attention, "can_attend", lambda model: case.get("flash", False))
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


def varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts_q: torch.Tensor,
    starts_k: torch.Tensor,
    longest_q: int,
    longest_k: int,
    scale: float,
    window_size: tuple[int, int],
) -> torch.Tensor:
    """What torch's kernel does on GPUs: [tokens, heads, head_dim], causal in each sequence, aligned at its end."""
    out = torch.zeros_like(query)
    for q, k in zip(pairwise(starts_q.tolist()), pairwise(starts_k.tolist()), strict=True):
        rows, columns = q[1] - q[0], k[1] - k[0]
        assert rows <= longest_q
        assert columns <= longest_k
        behind = torch.arange(rows)[:, None] + columns - rows - torch.arange(columns)
        mask = (behind >= 0) & ((behind <= window_size[0]) | (window_size[0] < 0))
        parts = (x[at[0] : at[1]].transpose(0, 1)[None] for x, at in ((query, q), (key, k), (value, k)))
        made = torch.nn.functional.scaled_dot_product_attention(*parts, attn_mask=mask, scale=scale, enable_gqa=True)
        out[q[0] : q[1]] = made[0].transpose(0, 1)
    return out


WINDOWED: dict[str, Callable[[], Any]] = {
    "a window of 16 tokens": lambda: tiny("mistral", sliding_window=16),
    "windows in some layers": lambda: tiny(
        "qwen2", use_sliding_window=True, sliding_window=16, layer_types=["full_attention", "sliding_attention"]
    ),
}


def answers(model: Any, **settings: Any) -> list[list[int]]:
    """Of prompts of several lengths, more than go into one batch."""
    prompts = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [14, 15, 16, 17], list(range(20, 60))]
    config = GenerationConfig(max_new_tokens=6, min_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    batching = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32, **settings)
    found = model.generate_batch(prompts, config, batching, progress_bar=False)
    return [each.generated_tokens for each in sorted(found.values(), key=lambda each: each.request_id)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="with flash attention, CUDA graphs are for models on GPUs")
@pytest.mark.parametrize("name", ["llama", "mixtral", "a window of 16 tokens", "windows in some layers"])
def test_torchs_flash_attention_gives_the_tokens_of_sdpa(
    name: str,
    originals: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(continuous_batching, "_said", set())
    model = load(originals[name] if name in originals else write_pair(tmp_path, WINDOWED[name](), Recipe()))
    before = model.config._attn_implementation
    expected = answers(model)
    used: list[int] = []
    monkeypatch.setattr(paged_attention, "can_attend", lambda model: True)
    monkeypatch.setattr(paged_attention, "_kernel", lambda: lambda *a, **k: used.append(1) or varlen(*a, **k))
    with caplog.at_level(logging.INFO, "graftq"):
        assert answers(model) == expected
    assert used
    assert caplog.text.count("torch's flash attention") == 1
    assert model.config._attn_implementation == before


@pytest.mark.parametrize(
    ("name", "is_left_alone"),
    [
        ("llama", False),
        ("mixtral", False),
        ("qwen3_moe", False),
        ("gemma3", False),
        ("gemma2", True),
        ("gpt_oss", True),
    ],
)
def test_models_whose_attention_is_more_than_that_are_left_alone(name: str, is_left_alone: bool) -> None:
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    assert paged_attention._asks_for_more(module) == is_left_alone


@pytest.mark.parametrize(
    ("given", "chosen", "asked", "expected"),
    [
        ("sdpa", "sdpa", (True,), "torch_flash"),
        ("sdpa", "paged|sdpa", (), "paged|torch_flash"),
        ("sdpa", "sdpa", (False,), "sdpa"),
        ("paged|sdpa", "paged|sdpa", (), "paged|sdpa"),
        ("sdpa", "flash_attention_2", (True,), "flash_attention_2"),
        ("eager", "paged|eager", (True,), "paged|eager"),
    ],
    ids=["by default", "before 5.19", "refused", "refused before 5.19", "its package is there", "eager"],
)
def test_what_the_caller_and_transformers_choose_stays(
    given: str, chosen: str, asked: tuple[bool, ...], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(continuous_batching, "_can_switch", lambda model: True)
    config = SimpleNamespace(_attn_implementation=given)
    config.get_text_config = lambda: config
    stock = lambda manager, model, *asked: setattr(config, "_attn_implementation", chosen)  # noqa: E731
    continuous_batching._switch_attention(stock)(SimpleNamespace(), SimpleNamespace(config=config), *asked)
    assert config._attn_implementation == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch's flash attention is for GPUs")
def test_torchs_flash_attention_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a trained model, whose tokens rounding does not decide."""
    model = load(ROOT / "examples" / "tiny-mixtral-gptq", dtype=torch.float16, device_map="cuda")
    used: list[int] = []
    kernel = paged_attention._kernel()
    assert kernel is not None
    monkeypatch.setattr(paged_attention, "_kernel", lambda: lambda *a, **k: used.append(1) or kernel(*a, **k))
    made = answers(model)
    assert used
    monkeypatch.setattr(paged_attention, "can_attend", lambda model: False)
    assert made == answers(model)


@pytest.mark.parametrize("first", ["AutoModelForCausalLM", "generation.utils", "modeling_utils"])
def test_taken_over_in_any_order_of_imports(first: str) -> None:
    """Of these modules some import the others before they are complete."""
    import_first = f"from transformers import {first}" if "." not in first else f"import transformers.{first}"
    code = f"{import_first}\nfrom transformers.generation.continuous_batching import continuous_api as api"
    said = run("-c", f"{code}\nprint(api.ContinuousBatchingManager.switch_to_cb_friendly_attn.__code__.co_filename)")
    assert said.stdout.strip() == continuous_batching.__file__
    assert not said.stderr


def test_taken_over() -> None:
    init = continuous_api.ContinuousMixin.init_continuous_batching
    assert init.__globals__ is vars(continuous_batching)


def test_transformers_4_generates_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its continuous batching takes other arguments, and our quantizer for 5 cannot be imported there."""
    monkeypatch.setattr(adapter, "_version", lambda: (4, 57))
    seams = adapter.graftq_seams("transformers") or {}
    assert sorted(seams) == ["transformers.modeling_utils", "transformers.quantizers.auto"]
