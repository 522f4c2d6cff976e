"""Packed embeddings, as GPTQModel packs them: with tokens for inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import edit, write_pair
from support.gptq import Recipe, quantize
from support.loading import assert_right, load
from support.models import logits, relative_error, tiny

RECIPES = [
    Recipe(desc_act=False),
    Recipe(bits=3, sym=False),
    Recipe(bits=8, group_size=-1, checkpoint_format="gptq_v2"),
]


def pack_embedding(checkpoint: Path, name: str, recipe: Recipe) -> None:
    """Pack the embedding of a checkpoint, and round that of its twin."""
    plain = checkpoint.parent / "float" / "model.safetensors"
    state = load_file(plain)
    tensors, dequantized = quantize(state[f"{name}.weight"].T, recipe, np.random.default_rng(0))
    state[f"{name}.weight"] = dequantized.T.contiguous()
    save_file(state, plain, metadata={"format": "pt"})

    def change(packed: dict[str, torch.Tensor]) -> None:
        del packed[f"{name}.weight"]
        packed.update({f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()})

    edit(checkpoint, change)


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize(
    ("architecture", "name", "changes"),
    [
        ("llama", "model.embed_tokens", {}),
        ("llama", "model.embed_tokens", {"vocab_size": 101}),
        ("llama", "model.embed_tokens", {"tie_word_embeddings": True}),
        ("llama", "model.embed_tokens", {"vocab_size": 64}),
        ("gpt2", "transformer.wte", {"tie_word_embeddings": True}),
        ("gemma", "model.embed_tokens", {}),
        ("mixtral", "model.embed_tokens", {}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else str(value),
)
def test_loads_and_saves(architecture: str, name: str, changes: dict[str, Any], recipe: Recipe, tmp_path: Path) -> None:
    model = tiny(architecture, **changes)
    checkpoint = write_pair(tmp_path, model, recipe, only=r"layers|\.h\.")
    pack_embedding(checkpoint, name, recipe)
    if changes.get("vocab_size") == 64:  # the batch has tokens beyond
        ids = torch.arange(20)[None]
        with torch.no_grad():
            expected = load(checkpoint.parent / "float")(ids).logits
            assert relative_error(load(checkpoint)(ids).logits, expected) < 1e-5
        return
    found = assert_right(checkpoint)
    found.save_pretrained(tmp_path / "saved")
    assert f"{name}.qweight" in load_file(tmp_path / "saved" / "model.safetensors")
    assert logits(load(tmp_path / "saved")).equal(logits(found))
