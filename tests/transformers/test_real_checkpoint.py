"""A Mixtral that was trained, and quantized by AutoGPTQ, against ground truth computed without graftq."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.loading import load
from support.models import relative_error
from transformers import AutoTokenizer, pipeline

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "examples" / "tiny-mixtral-gptq"


@pytest.fixture(scope="module")
def truth() -> dict[str, torch.Tensor]:
    with np.load(ROOT / "tests" / "data" / "tiny-mixtral-truth.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


@pytest.mark.parametrize("device_map", ["auto", None], ids=["device_map auto", "no device_map"])
@pytest.mark.parametrize("prompt", ["0", "1"])
def test_logits_and_greedy_tokens(device_map: str | None, prompt: str, truth: dict[str, torch.Tensor]) -> None:
    model = load(CHECKPOINT, device_map=device_map)
    ids = truth[f"ids{prompt}"].reshape(1, -1)
    with torch.no_grad():
        found = model(ids).logits[0]
    assert relative_error(found, truth[f"logits{prompt}"].reshape(found.shape)) < 1e-5
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False)
    assert tokens[0, -32:].equal(truth[f"greedy{prompt}"].flatten()[-32:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, "auto"], ids=str)
def test_half_precision(dtype: torch.dtype | str, truth: dict[str, torch.Tensor]) -> None:
    model = load(CHECKPOINT, device_map="cpu", dtype=dtype)
    assert model.dtype == (torch.float16 if dtype == "auto" else dtype)
    with torch.no_grad():
        found = model(truth["ids0"].reshape(1, -1)).logits[0].float()
    assert relative_error(found, truth["logits0"].reshape(found.shape)) < 0.05


def test_pipeline_batched_with_padding() -> None:
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT, padding_side="left")
    model = load(CHECKPOINT)
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    prompts = ["def ", "import os\nimport sys\n\n\nclass Parser:\n    def __init__(self"]
    alone = [generate(prompt, max_new_tokens=8, do_sample=False)[0]["generated_text"] for prompt in prompts]
    together = generate(prompts, max_new_tokens=8, do_sample=False, batch_size=2)
    assert [answer[0]["generated_text"] for answer in together] == alone


def test_sampling_is_the_twin_of_itself() -> None:
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    inputs = tokenizer("class Node:", return_tensors="pt", return_token_type_ids=False)
    model = load(CHECKPOINT)
    drawn = []
    for _ in range(2):
        torch.manual_seed(7)
        drawn.append(model.generate(**inputs, do_sample=True, temperature=0.7, top_p=0.95, top_k=40, max_new_tokens=8))
    assert drawn[0].equal(drawn[1])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations(implementation: str, truth: dict[str, torch.Tensor]) -> None:
    model = load(CHECKPOINT, attn_implementation=implementation)
    with torch.no_grad():
        found = model(truth["ids0"].reshape(1, -1)).logits[0]
    assert relative_error(found, truth["logits0"].reshape(found.shape)) < 1e-5
