"""Saving what accelerate has dispatched after loading: packed layers in a kernel's layout, on disk or elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from safetensors.torch import load_file
from support.loading import load
from support.models import logits, relative_error

from graftq.adapters.transformers.saving import save_quantized
from graftq.quant_linear.linear import QuantLinear

PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
PLACES: dict[str, dict[str, Any]] = {
    "one layer on the disk": {"on_disk": ("model.layers.1",)},
    "all layers on the disk": {"on_disk": ("model.layers.0", "model.layers.1")},
    "brought in block by block": {
        "on_disk": ("model.layers.1",),
        "preload_module_classes": ["LlamaMLP", "MixtralSparseMoeBlock"],
    },
    "head and embeddings, too": {"on_disk": PARTS[1:]},
    "packed tensors, too": {"on_disk": ("model.layers.1",), "offload_buffers": True},
}


def dispatched(checkpoint: Path, folder: Path, on_disk: tuple[str, ...], **options: Any) -> Any:
    places = {part: "disk" if part in on_disk else "cpu" for part in PARTS}
    return dispatch_model(load(checkpoint), places, main_device="cpu", offload_dir=folder, **options)


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same(found: Path, expected: Path) -> None:
    old, new = state_of(expected), state_of(found)
    assert new.keys() == old.keys()
    assert not [name for name in old if old[name].dtype != new[name].dtype or not old[name].equal(new[name])]


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize("places", PLACES)
def test_every_tensor_comes_back(places: str, name: str, originals: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = originals[name]
    model = dispatched(checkpoint, tmp_path / "offloaded", **PLACES[places])
    assert relative_error(logits(model), logits(load(checkpoint.parent / "float"))) < 1e-5
    model.save_pretrained(tmp_path / "saved", max_shard_size="40KB")
    assert_same(tmp_path / "saved", checkpoint)
    assert logits(load(tmp_path / "saved")).equal(logits(load(checkpoint)))
    assert relative_error(logits(model), logits(load(checkpoint.parent / "float"))) < 1e-5


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
def test_under_autogptq_names(originals: dict[str, Path], tmp_path: Path) -> None:
    model = dispatched(originals["llama"], tmp_path / "offloaded", PARTS[2:3])
    save_quantized(model, tmp_path / "saved")
    assert (tmp_path / "saved" / "gptq_model-4bit-32g.safetensors").exists()
    assert_same(tmp_path / "saved", originals["llama"])


CALLS: dict[str, Callable[[Any], Any]] = {
    "a layer": lambda model: model.model.layers[1].self_attn.q_proj,
    "experts": lambda model: model.model.layers[1].mlp.experts,
}


@pytest.mark.parametrize("what", CALLS)
def test_another_layout_than_it_was_dispatched_in(what: str, originals: dict[str, Path], tmp_path: Path) -> None:
    """The hook brings the tensors in under the names of the old layout, for this call and for the next."""
    module = CALLS[what](dispatched(originals["mixtral"], tmp_path, PARTS[2:3], offload_buffers=True))
    module.pinned = True  # what needs another layout, on a machine that has one kernel
    module._bound_to = None
    x = torch.randn(3, 64)
    arguments = (x,) if isinstance(module, QuantLinear) else (x, torch.tensor([[0, 1]] * 3), torch.ones(3, 2) / 2)
    with pytest.raises(RuntimeError, match="was offloaded in the layout of another kernel"):
        module(*arguments)
