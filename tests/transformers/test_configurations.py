"""The configuration of a loaded model, given to another: it loads packed weights, and labels no float ones."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.loading import load
from support.models import logits, relative_error, tiny
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GPTQConfig, LlamaConfig, LlamaForCausalLM


def saved(config: Any, folder: Path) -> Any:
    config.save_pretrained(folder)
    return AutoConfig.from_pretrained(folder)


def with_parameters(config: Any, parameters: Any) -> Any:
    config = copy.deepcopy(config)
    config.quantization_config = parameters
    return config


MADE: dict[str, Callable[[Any, Path], Any]] = {
    "the model's own": lambda config, folder: config,
    "a deep copy": lambda config, folder: copy.deepcopy(config),
    "a pickled copy": lambda config, folder: pickle.loads(pickle.dumps(config)),
    "saved and read": saved,
    "the folder where it was saved": lambda config, folder: saved(config, folder)._name_or_path or folder,
    "by way of a dict": lambda config, folder: LlamaConfig.from_dict(config.to_dict()),
    "GPTQConfig": lambda config, folder: with_parameters(config, GPTQConfig(bits=4, group_size=32)),
    "a dict of parameters": lambda config, folder: with_parameters(config, config.quantization_config.to_dict()),
    "without parameters": lambda config, folder: with_parameters(config, None),
}


@pytest.fixture
def twin(originals: dict[str, Path]) -> torch.Tensor:
    return logits(load(originals["llama"].parent / "float"))


@pytest.mark.parametrize("made", MADE)
def test_loads_again(made: str, originals: dict[str, Path], tmp_path: Path, twin: torch.Tensor) -> None:
    first = load(originals["llama"])
    second = load(originals["llama"], config=MADE[made](first.config, tmp_path))
    assert relative_error(logits(second), twin) < 1e-5
    third = load(originals["llama"], config=second.config)
    assert relative_error(logits(third), twin) < 1e-5
    assert relative_error(logits(first), twin) < 1e-5


def test_of_a_model_that_was_dequantized(originals: dict[str, Path], tmp_path: Path, twin: torch.Tensor) -> None:
    model = load(originals["llama"]).dequantize()
    assert relative_error(logits(load(originals["llama"], config=model.config)), twin) < 1e-5
    model.save_pretrained(tmp_path)
    assert relative_error(logits(load(tmp_path, config=model.config)), twin) < 1e-5


def test_of_a_base_model(originals: dict[str, Path], twin: torch.Tensor) -> None:
    base = AutoModel.from_pretrained(originals["llama"], dtype=torch.float32)
    assert relative_error(logits(load(originals["llama"], config=base.config)), twin) < 1e-5


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("argument", ["the model's own", "GPTQConfig"])
def test_beside_parameters_in_the_call(argument: str, originals: dict[str, Path], twin: torch.Tensor) -> None:
    config = load(originals["llama"]).config
    given = config.quantization_config if argument == "the model's own" else GPTQConfig(bits=4, group_size=32)
    for _ in range(2):
        model = load(originals["llama"], config=config, quantization_config=given)
        assert relative_error(logits(model), twin) < 1e-5


@pytest.mark.parametrize("config", ["of a loaded model", "as read"])
def test_optimum(config: str, originals: dict[str, Path], twin: torch.Tensor) -> None:
    from optimum.gptq import load_quantized_model

    checkpoint = originals["llama"]
    model = (
        load(checkpoint) if config == "of a loaded model" else LlamaForCausalLM(AutoConfig.from_pretrained(checkpoint))
    )
    loaded = load_quantized_model(model, save_folder=str(checkpoint), device_map={"": "cpu"})
    assert relative_error(logits(loaded), twin) < 1e-5


FLOAT: dict[str, Callable[[Any, Path], Any]] = {
    "from_config": lambda config, path: AutoModelForCausalLM.from_config(config),
    "its class": lambda config, path: LlamaForCausalLM(config),
    "from_config, parameters as a dict": lambda config, path: AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(path)
    ),
    "float weights": lambda config, path: load(path.parent / "float", config=config),
    "float weights, of the base model": lambda config, path: AutoModel.from_pretrained(
        path.parent / "float", config=config, dtype=torch.float32
    ),
}


@pytest.mark.parametrize("made", FLOAT)
def test_a_float_model_is_not_labeled(made: str, originals: dict[str, Path], tmp_path: Path) -> None:
    first = load(originals["llama"])
    model = FLOAT[made](first.config, originals["llama"])
    model.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    assert not (tmp_path / "saved" / "quantize_config.json").exists()
    again = type(model).from_pretrained(tmp_path / "saved")
    assert all(tensor.equal(again.get_parameter(name)) for name, tensor in model.named_parameters())
    first.save_pretrained(tmp_path / "packed")
    assert logits(load(tmp_path / "packed")).equal(logits(first))
    assert "quantization_config" in json.loads((tmp_path / "packed" / "config.json").read_text())


def test_others_that_are_labeled_stay_so(tmp_path: Path) -> None:
    """Another package's packed layers, and a configuration on its own."""
    model = tiny("llama")
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    model.lm_head.register_buffer("qweight", torch.zeros(1, dtype=torch.int32))
    model.save_pretrained(tmp_path / "packed by others")
    model.config.save_pretrained(tmp_path / "configuration")
    for folder in ("packed by others", "configuration"):
        assert "quantization_config" in json.loads((tmp_path / folder / "config.json").read_text())
