"""``del model`` frees what was loaded at once, as for a float model: no cycle waits for the garbage collector."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import write_pair
from support.gptq import Recipe
from support.loading import load
from support.models import logits, tiny
from support.repacking import repacked  # noqa: F401 - a fixture
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
"""Layers of one input are multiplied in one."""

MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "dense": (lambda: tiny("llama"), {}),
    "experts": (lambda: tiny("mixtral"), {}),
    "experts and routers": (lambda: tiny("mixtral"), {"only": r"(proj|w[123]|gate)$"}),
    "experts interleaved": (lambda: tiny("gpt_oss"), {}),
    "layers joined": (lambda: tiny("llama", **WIDE), {"recipe": Recipe(desc_act=False, group_size=64)}),
}


def loaded(checkpoint: Path, tmp_path: Path) -> Any:
    return load(checkpoint)


def called(checkpoint: Path, tmp_path: Path) -> Any:
    model = load(checkpoint)
    logits(model)
    return model


def saved(checkpoint: Path, tmp_path: Path) -> Any:
    model = load(checkpoint)
    model.save_pretrained(tmp_path / "saved")
    return model


def reloaded(checkpoint: Path, tmp_path: Path) -> Any:
    saved(checkpoint, tmp_path)
    return load(tmp_path / "saved")


def copied(checkpoint: Path, tmp_path: Path) -> Any:
    return deepcopy(load(checkpoint))


def dequantized(checkpoint: Path, tmp_path: Path) -> Any:
    return load(checkpoint).dequantize()


@pytest.fixture
def no_collection() -> Iterator[None]:
    """What is in a cycle stays."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def modules_left(make: Callable[[], Any]) -> list[str]:
    """Names of the modules that outlive their model."""
    model = make()
    watched = {name or "the model": weakref.ref(module) for name, module in model.named_modules()}
    del model
    return [name for name, reference in watched.items() if reference() is not None]


@pytest.mark.parametrize("history", [loaded, called, saved, reloaded, copied, dequantized], ids=lambda f: f.__name__)
@pytest.mark.parametrize("what", MODELS)
@pytest.mark.parametrize("layout", ["as stored", "rearranged"])
def test_del_frees_the_model(
    layout: str, what: str, history: Any, tmp_path: Path, request: pytest.FixtureRequest, no_collection: None
) -> None:
    make, arguments = MODELS[what]
    checkpoint = write_pair(tmp_path, make(), **{"recipe": Recipe(), **arguments})
    if layout == "rearranged":
        request.getfixturevalue("repacked")
    assert not modules_left(lambda: history(checkpoint, tmp_path))


def test_models_inside_a_model(tmp_path: Path, no_collection: None) -> None:
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
    )
    config = LlavaConfig(vision_config=vision, text_config=tiny("llama").config, image_token_index=95)
    torch.manual_seed(0)
    checkpoint = write_pair(tmp_path, LlavaForConditionalGeneration(config), Recipe())
    load_any = LlavaForConditionalGeneration.from_pretrained
    assert hasattr(load_any(checkpoint).model.language_model, "hf_quantizer")
    assert not modules_left(lambda: load_any(checkpoint))
