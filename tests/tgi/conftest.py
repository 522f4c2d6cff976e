"""Checkpoints that a server can be started with, and what transformers generates from them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import write_pair
from support.gptq import Recipe
from support.models import tiny
from support.processes import ROOT, build_wheel, copy_sources, unpack_wheel
from transformers import AutoModelForCausalLM, AutoTokenizer

REAL = ROOT / "examples" / "tiny-mixtral-gptq"

FORMATS: dict[str, tuple[str, Recipe, dict[str, Any]]] = {
    "mixtral 3-bit act-order": ("mixtral", Recipe(bits=3, zero_bias=True), {}),
    "mixtral 8-bit": ("mixtral", Recipe(bits=8, group_size=-1), {"layout": "sharded"}),
    "mixtral 4-bit asymmetric": ("mixtral", Recipe(sym=False), {"layout": "AutoGPTQ's"}),
    "llama 2-bit v2": ("llama", Recipe(bits=2, sym=False, checkpoint_format="gptq_v2"), {}),
    "llama 4-bit in order": ("llama", Recipe(desc_act=False), {}),
    "llama partly": (
        "llama",
        Recipe(),
        {
            "overrides": lambda name: None if "layers.1.self_attn" in name else Recipe(),
            "dynamic": {r"-:.*layers\.1\.self_attn.*": {}},
        },
    ),
    "qwen2 with biases": ("qwen2", Recipe(bits=4), {}),
    "phi3, q, k and v in one": ("phi3", Recipe(bits=4), {}),
    "gpt_neox, head by head": ("gpt_neox", Recipe(bits=3), {"only": r"(query_key_value|dense\w*)$"}),
}


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """graftq, built and unpacked, for the server's own environment."""
    wheel = build_wheel(copy_sources(tmp_path_factory.mktemp("sources")), tmp_path_factory.mktemp("wheel"))
    return unpack_wheel(wheel, tmp_path_factory.mktemp("installed"))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """From a format's name to its ``gptq`` folder; the float twin lies beside it, both with a tokenizer."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            kind, recipe, options = FORMATS[name]
            # Four heads for keys and values, so that two shards have whole ones.
            model = tiny(kind, vocab_size=2048, num_key_value_heads=4, max_position_embeddings=1024)
            made[name] = write_pair(tmp_path_factory.mktemp("pair"), model, recipe, **options)
            for folder in (made[name], made[name].parent / "float"):
                _complete(folder)
        return made[name]

    return make


def _complete(folder: Path) -> None:
    """Add what transformers 4 and the server look for: a tokenizer, and the configuration's older names."""
    for file in REAL.glob("*token*"):
        shutil.copy(file, folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["torch_dtype"] = config.pop("dtype")
    path.write_text(json.dumps(config))


@pytest.fixture(scope="session")
def greedy() -> Callable[[Path, str, int], list[int]]:
    """What transformers generates greedily in float32: (checkpoint, prompt, number of tokens) to tokens."""
    models: dict[Path, Any] = {}
    # Not the checkpoint's: transformers 5 would turn the same files into the tokenizer usual for the architecture.
    tokenizer = AutoTokenizer.from_pretrained(REAL)

    def generate(checkpoint: Path, prompt: str, tokens: int) -> list[int]:
        if checkpoint not in models:
            models[checkpoint] = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
            models[checkpoint].generation_config.eos_token_id = None
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        output = models[checkpoint].generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
        return output[0, -tokens:].tolist()

    return generate
