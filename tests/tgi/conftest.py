"""Checkpoints that a server can be started with, and what transformers generates from them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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

DEEPSEEK: dict[str, Any] = {
    # The server's cache takes heads of this size alone, and its code this kind of rotary embedding.
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "head_dim": 64,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 1.0,
        "original_max_position_embeddings": 1024,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "routed_scaling_factor": 1.0,  # whatever it is, the server's code does not apply it
    # As in DeepSeek's own files; not all of it is known to transformers.
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
}


@dataclass(frozen=True)
class Format:
    """A checkpoint to make up: architecture, how it is quantized, its sizes, and options of ``write_pair``."""

    kind: str
    recipe: Recipe
    sizes: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


PARTLY = {
    "overrides": lambda name: None if "layers.1.self_attn" in name else Recipe(),
    "dynamic": {r"-:.*layers\.1\.self_attn.*": {}},
}
FORMATS = {
    "mixtral 3-bit act-order": Format("mixtral", Recipe(bits=3, zero_bias=True)),
    "mixtral 8-bit": Format("mixtral", Recipe(bits=8, group_size=-1), options={"layout": "sharded"}),
    "mixtral 4-bit asymmetric": Format("mixtral", Recipe(sym=False), options={"layout": "AutoGPTQ's"}),
    "llama 2-bit v2": Format("llama", Recipe(bits=2, sym=False, checkpoint_format="gptq_v2")),
    "llama 4-bit in order": Format("llama", Recipe(desc_act=False)),
    "llama partly": Format("llama", Recipe(), options=PARTLY),
    "qwen2 with biases": Format("qwen2", Recipe(bits=4)),
    "phi3, q, k and v in one": Format("phi3", Recipe(bits=4)),
    "gpt_neox, head by head": Format("gpt_neox", Recipe(3), options={"only": r"(query_key_value|dense\w*)$"}),
    "deepseek_v3, groups of experts": Format("deepseek_v3", Recipe(bits=3), sizes=DEEPSEEK),
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
            own = FORMATS[name]
            # Four heads for keys and values, so that two shards have whole ones.
            sizes = {"vocab_size": 2048, "num_key_value_heads": 4, "max_position_embeddings": 1024, **own.sizes}
            folder = tmp_path_factory.mktemp("pair")
            made[name] = write_pair(folder, tiny(own.kind, **sizes), own.recipe, **own.options)
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
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    if rope["rope_type"] != "default":
        config["rope_scaling"] = rope
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
