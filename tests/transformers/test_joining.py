"""Projections of one input are multiplied in one, and the model is what it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import write_pair
from support.gptq import Recipe
from support.loading import assert_right, load
from support.models import tiny
from support.repacking import repacked  # noqa: F401 - a fixture

from graftq.quant_linear.linear import QuantLinear

pytestmark = pytest.mark.usefixtures("repacked")

WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
"""Outputs in whole tiles: others are not joined."""

JOINED = {
    "llama": {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"},
    "qwen2": {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"},  # with biases
    "gemma": {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"},
    "mixtral": {"q_proj", "k_proj", "v_proj"},
    "phi3": set(),  # the model's own are in one
    "gpt2": set(),
}


def joined(model: Any) -> set[str]:
    """The last names of the layers that are multiplied in one with others."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantLinear)}
    return {name.rpartition(".")[2] for name, layer in layers.items() if layer.shared is not None}


@pytest.mark.parametrize("name", JOINED)
def test_logits_and_tokens(name: str, tmp_path: Path) -> None:
    wide = {"n_embd": 256} if name == "gpt2" else WIDE
    checkpoint = write_pair(tmp_path, tiny(name, **wide), Recipe(desc_act=False, group_size=64))
    model = assert_right(checkpoint)
    assert joined(model) == JOINED[name]
    twin = load(checkpoint.parent / "float")
    prompts = torch.arange(3, 21).view(3, 6)
    for arguments in ({}, {"num_beams": 2}):
        tokens = [
            each.generate(prompts, max_new_tokens=8, do_sample=False, eos_token_id=None, **arguments)
            for each in (model, twin)
        ]
        assert torch.equal(*tokens)
    assert joined(model) == JOINED[name]


def test_layers_of_different_act_orders_are_left_alone(tmp_path: Path) -> None:
    recipes = {"q_proj": Recipe(group_size=64), "k_proj": Recipe(group_size=64, desc_act=False)}
    checkpoint = write_pair(
        tmp_path,
        tiny("llama", **WIDE),
        Recipe(group_size=64, desc_act=False),
        overrides=lambda module: recipes.get(module.rpartition(".")[2], Recipe(group_size=64, desc_act=False)),
    )
    assert joined(assert_right(checkpoint)) == {"gate_proj", "up_proj"}
