"""Checkpoints for vLLM to run, what it should answer, and how engines are started for them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from support.checkpoints import write_pair
from support.gptq import Recipe
from support.models import tiny

PROMPTS = [[5, 17, 33, 8, 64, 12], [9, 200, 44]]
NEW_TOKENS = 8

# Wide enough for two groups of 128 in the projections that tensor parallelism cuts along their inputs.
SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
}

# What each group of cases starts its process with; a group's cases share it.
QUIET = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1"}
COMMON = {**QUIET, "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
ALONE = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
GROUPS: dict[str, dict[str, str]] = {
    "eager": {**COMMON, **ALONE, "TORCHDYNAMO_DISABLE": "1"},
    "compiled": {**COMMON, **ALONE, "VLLM_DISABLE_COMPILE_CACHE": "1"},
    "multiprocess": {**COMMON, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCHDYNAMO_DISABLE": "1"},
    "two ranks": {**COMMON, "VLLM_CPU_OMP_THREADS_BIND": "0|1", "TORCHDYNAMO_DISABLE": "1"},
    "two stages": {**COMMON, "VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_DISABLE_COMPILE_CACHE": "1"},
    "a GPU": {**QUIET, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0"},
    "two GPUs": {**QUIET, "VLLM_HOST_IP": "127.0.0.1", "VLLM_USE_FLASHINFER_SAMPLER": "0"},
}
GPUS = {"a GPU": 1, "two GPUs": 2}
COMPILED = ("compiled", "two stages", *GPUS)
"""vLLM's CPU runner allocates what one stage hands to the next only while it warms a compiled model up."""


@dataclass(frozen=True)
class Case:
    """One engine to start.

    Attributes:
        id: Its name.
        group: The group of :data:`GROUPS` that it runs in.
        build: Writes the checkpoint into an empty folder and returns its path; ``float`` lies beside it.
        engine: Arguments of ``LLM``.
        lora: Whether the checkpoint comes with an adapter, in ``lora`` beside it.
        error: What vLLM should say instead of answering; a regular expression.
        truth: Prompts and greedy tokens, in a file like ``tests/data/tiny-mixtral-truth.npz``, instead of a float twin.
    """

    id: str
    group: str
    build: Callable[[Path], Path]
    engine: Mapping[str, Any] = field(default_factory=dict)
    lora: bool = False
    error: str = ""
    truth: Path | None = None

    def __str__(self) -> str:
        return self.id

    def order(self, folder: Path) -> dict[str, Any]:
        """Build the checkpoint, and say what the driver is to do with it."""
        checkpoint = self.build(folder)
        engine = {"distributed_executor_backend": "uni", **self.engine}
        if self.group in COMPILED:
            engine["enforce_eager"] = False
        if self.group in GPUS:  # the kernels are for this dtype; it fits beside whatever else is on the GPU
            engine |= {"dtype": "float16", "gpu_memory_utilization": 0.2, "kv_cache_memory_bytes": 2**30}
            engine["max_num_batched_tokens"] = 128  # no kernels are compiled for more
        if self.group in ("two ranks", "two stages", "two GPUs"):
            engine["distributed_executor_backend"] = "mp"
        prompts, expected = PROMPTS, None
        if self.truth is not None:
            prompts, expected = read_truth(self.truth)
        elif not self.error:
            expected = ask_twin(checkpoint.parent / "float")
        return {
            "id": self.id,
            "model": str(checkpoint),
            "prompts": prompts,
            "tokens": NEW_TOKENS,
            "engine": engine,
            "lora": str(checkpoint.parent / "lora") if self.lora else None,
            "expected": expected,
        }


def read_truth(file: Path) -> tuple[list[list[int]], list[dict[str, list[Any]]]]:
    """Prompts, and the greedy tokens after each, from a file like ``tests/data/tiny-mixtral-truth.npz``."""
    with np.load(file) as arrays:
        truth = {name: arrays[name].flatten().tolist() for name in arrays.files}
    prompts = [truth["ids0"], truth["ids1"]]
    return prompts, [{"tokens": truth[name][-32:][:NEW_TOKENS]} for name in ("greedy0", "greedy1")]


def ask_twin(folder: Path) -> list[dict[str, list[Any]]]:
    """Greedy tokens, their log-probabilities, and their lead over the second best, of a float checkpoint in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    answers = []
    for prompt in PROMPTS:
        ids, chosen, leads = list(prompt), [], []
        for _ in range(NEW_TOKENS):
            with torch.no_grad():
                scores = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            first, second = scores.topk(2).values.tolist()
            ids.append(int(scores.argmax()))
            chosen.append(first)
            leads.append(first - second)
        answers.append({"tokens": ids[len(prompt) :], "logprobs": chosen, "leads": leads})
    return answers


def pair(
    name: str, recipe: Recipe, *, sizes: Mapping[str, Any] | None = None, **options: Any
) -> Callable[[Path], Path]:
    """A builder for a tiny random model of that architecture; options as for ``write_pair``."""

    def build(folder: Path) -> Path:
        return write_pair(folder, tiny(name, **{**SIZES, **(sizes or {})}), recipe, **options)

    return build


def mixed(name: str, bits: int, group_size: int) -> Callable[[Path], Path]:
    """Four layers that differ in act-order and symmetry, declared by ``dynamic`` rules."""
    kinds = [(True, True), (True, False), (False, True), (False, False)]
    recipes = {f"layers.{i}.": Recipe(bits, group_size, act, sym) for i, (act, sym) in enumerate(kinds)}
    rules = {rf".*layers\.{i}\..*": {"desc_act": act, "sym": sym} for i, (act, sym) in enumerate(kinds)}

    def of(module: str) -> Recipe:
        return next(recipe for part, recipe in recipes.items() if part in module)

    sizes = {"num_hidden_layers": 4}
    return pair(name, Recipe(bits, group_size), sizes=sizes, overrides=of, dynamic=rules)


def with_adapter(build: Callable[[Path], Path]) -> Callable[[Path], Path]:
    """The same checkpoint with a LoRA adapter beside it, and the adapter merged into the float twin."""

    def extended(folder: Path) -> Path:
        checkpoint = build(folder)
        twin = folder / "float" / "model.safetensors"
        state = load_file(twin)
        generator = torch.Generator().manual_seed(3)
        adapter = {}
        for name in [name for name in state if name.endswith(("q_proj.weight", "down_proj.weight"))]:
            n, k = state[name].shape
            a, b = torch.randn(4, k, generator=generator) * 0.1, torch.randn(n, 4, generator=generator) * 0.1
            state[name] += 2 * b @ a
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            adapter |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
        save_file(state, twin, metadata={"format": "pt"})
        (folder / "lora").mkdir()
        save_file(adapter, folder / "lora" / "adapter_model.safetensors", metadata={"format": "pt"})
        settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
        settings |= {"bias": "none", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(checkpoint)}
        (folder / "lora" / "adapter_config.json").write_text(json.dumps(settings))
        return checkpoint

    return extended


def damaged(build: Callable[[Path], Path], damage: Callable[[Path], None]) -> Callable[[Path], Path]:
    """The same checkpoint after ``damage`` has been at it."""

    def broken(folder: Path) -> Path:
        checkpoint = build(folder)
        damage(checkpoint)
        return checkpoint

    return broken


def copied(original: Path) -> Callable[[Path], Path]:
    """A checkpoint that exists already."""

    def build(folder: Path) -> Path:
        return Path(shutil.copytree(original, folder / "gptq"))

    return build
