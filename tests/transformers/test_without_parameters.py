"""Packed weights without ``quantize_config.json``: loaded by what the user says, or refused with what to write."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import drop_g_idx, edit, write_pair, zero_g_idx
from support.gptq import Recipe
from support.loading import load
from support.models import logits, relative_error, tiny
from transformers import AutoConfig, GPTQConfig

from graftq.plugin.checkpoint.inspection import inspect
from graftq.plugin.checkpoint.source import Source
from graftq.quant_linear.errors import CheckpointError
from graftq.quant_linear.linear import QuantLinear


def forget(checkpoint: Path) -> Path:
    """Remove every statement about quantization."""
    (checkpoint / "quantize_config.json").unlink(missing_ok=True)
    config = json.loads((checkpoint / "config.json").read_text())
    config.pop("quantization_config", None)
    (checkpoint / "config.json").write_text(json.dumps(config))
    return checkpoint


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return forget(write_pair(tmp_path, tiny("llama"), Recipe(bits=4, group_size=32)))


def renamed(name: str) -> Callable[[Path], None]:
    return lambda checkpoint: [file.rename(checkpoint / name) for file in checkpoint.glob("*.safetensors")]


def pickled(name: str, **options: Any) -> Callable[[Path], None]:
    def change(checkpoint: Path) -> None:
        file = checkpoint / "model.safetensors"
        torch.save(load_file(file), checkpoint / name, **options)
        file.unlink()

    return change


def as_configuration(checkpoint: Path, parameters: Any) -> dict[str, Any]:
    config = AutoConfig.from_pretrained(checkpoint)
    config.quantization_config = parameters
    return {"config": config}


SAID = {
    "GPTQConfig": lambda path: {"quantization_config": GPTQConfig(bits=4, group_size=32)},
    "GPTQConfig for quantizing": lambda path: {
        "quantization_config": GPTQConfig(bits=4, group_size=32, dataset=["some text"])
    },
    "a dict": lambda path: {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32}},
    "GPTQConfig in the configuration": lambda path: as_configuration(path, GPTQConfig(bits=4, group_size=32)),
    "a dict in the configuration": lambda path: as_configuration(path, {"bits": 4, "group_size": 32}),
}
FILES: dict[str, tuple[Callable[[Path], Any], dict[str, Any]]] = {
    "model": (lambda checkpoint: None, {}),
    "gptq_model": (renamed("gptq_model-4bit-32g.safetensors"), {}),
    "of another group": (renamed("gptq_model-4bit-128g.safetensors"), {}),
    "llama7b": (renamed("llama7b-4bit-32g.safetensors"), {}),
    ".pt": (pickled("llama7b-4bit-32g.pt"), {"use_safetensors": False}),
    "old .pt": (pickled("llama7b-4bit.pt", _use_new_zipfile_serialization=False), {"use_safetensors": False}),
    "pytorch_model.bin": (pickled("pytorch_model.bin"), {"use_safetensors": False}),
}


def assert_loads(checkpoint: Path, **arguments: Any) -> Any:
    model = load(checkpoint, **arguments)
    assert relative_error(logits(model), logits(load(checkpoint.parent / "float"))) < 1e-5
    return model


@pytest.mark.parametrize("said", SAID)
def test_what_the_user_says_counts(said: str, checkpoint: Path) -> None:
    assert_loads(checkpoint, **SAID[said](checkpoint))


@pytest.mark.parametrize("file", FILES)
def test_files_of_any_name(file: str, checkpoint: Path) -> None:
    change, arguments = FILES[file]
    change(checkpoint)
    assert_loads(checkpoint, quantization_config=GPTQConfig(bits=4, group_size=32), **arguments)


RECIPES = {
    "asymmetric": (Recipe(sym=False), None),
    "act-order": (Recipe(), None),
    "one group": (Recipe(group_size=-1), None),
    "3 bits": (Recipe(bits=3), None),
    "without g_idx": (Recipe(desc_act=False), drop_g_idx),
    "g_idx of zeros": (Recipe(desc_act=False), zero_g_idx),
}


@pytest.mark.parametrize("name", RECIPES)
def test_what_was_left_at_a_default_contradicts_nothing(name: str, tmp_path: Path) -> None:
    recipe, change = RECIPES[name]
    checkpoint = forget(write_pair(tmp_path, tiny("llama"), recipe))
    if change:
        edit(checkpoint, change)
    said = GPTQConfig(bits=recipe.bits, group_size=recipe.group_size)
    model = assert_loads(checkpoint, quantization_config=said)
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert logits(again).equal(logits(model))


@pytest.mark.parametrize(("wrong", "message"), [({"bits": 8}, "says 8 bits"), ({}, "says group_size 128")], ids=str)
def test_what_is_said_is_held_against_the_tensors(wrong: dict[str, int], message: str, checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(checkpoint, quantization_config=GPTQConfig(**{"bits": 4, **wrong}))


@pytest.mark.parametrize("file", FILES)
def test_nobody_says_anything(file: str, checkpoint: Path) -> None:
    change, arguments = FILES[file]
    change(checkpoint)
    shown = "" if file == "pytorch_model.bin" else r'.*\{"bits": 4, "group_size": 32\}: write that to quantize_config'
    with pytest.raises(CheckpointError, match=r"packed weights, but there is no quantize_config\.json" + shown):
        load(checkpoint, **arguments)


@pytest.mark.parametrize("file", ["llama7b-4bit-32g.pt", "pytorch_model.bin"])
def test_pickles_that_are_not_allowed_are_not_opened(file: str, checkpoint: Path) -> None:
    pickled(file)(checkpoint)
    with pytest.raises(CheckpointError, match=r"packed weights, but there is no quantize_config\.json.*group_size"):
        load(checkpoint)
    with pytest.raises(CheckpointError, match="only pickle files here"):
        load(checkpoint, quantization_config=GPTQConfig(bits=4, group_size=32))


def test_what_to_write_is_right(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        load(checkpoint)
    advice = caught.value.reason
    (checkpoint / "quantize_config.json").write_text(advice[advice.index("{") : advice.index("}") + 1])
    assert_loads(checkpoint)


def test_inspect_says_the_same(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=r'packed weights.*fit \{"bits": 4, "group_size": 32\}'):
        inspect(Source(str(checkpoint)))


def test_a_float_model_is_quantized_instead(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    rows = torch.randint(3, 96, (8, 16)).tolist()
    model = load(tmp_path, quantization_config=GPTQConfig(bits=4, group_size=32, dataset=rows))
    assert isinstance(model.model.layers[0].mlp.down_proj, QuantLinear)
