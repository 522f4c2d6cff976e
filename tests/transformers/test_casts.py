"""Casts of what holds a packed model: the weights stay what they are, and are saved as they were."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.loading import load
from support.models import logits, relative_error
from support.repacking import repacked  # noqa: F401 - a fixture
from torch import nn

from graftq.quant_linear.experts import QuantExperts
from graftq.quant_linear.linear import QuantLinear


def cast_parameters(part: nn.Module, dtype: torch.dtype, dimensions: tuple[int, ...]) -> None:
    for parameter in part.parameters():
        parameter.requires_grad = False
        if parameter.ndim in dimensions:
            parameter.data = parameter.data.to(dtype)


CASTS: dict[str, Callable[[nn.Module], Any]] = {
    "half": lambda part: part.half(),
    "bfloat16": lambda part: part.bfloat16(),
    "double": lambda part: part.double(),
    "to bfloat16 and back": lambda part: part.bfloat16().float(),
    "to a device and a dtype": lambda part: part.to("cpu", torch.float16),
    "to the dtype of a tensor": lambda part: part.to(torch.zeros(1, dtype=torch.bfloat16)),
    "type": lambda part: part.type(torch.float64),
    "one-dimensional parameters": lambda part: cast_parameters(part, torch.float32, (1,)),
    "all parameters": lambda part: cast_parameters(part, torch.bfloat16, (1, 2, 3)),
}


def packed_state(folder: Path) -> dict[str, torch.Tensor]:
    state = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    layers = {name.rpartition(".")[0] for name in state if name.endswith(".qweight")}
    return {name: tensor for name, tensor in state.items() if name.rpartition(".")[0] in layers}


@pytest.mark.usefixtures("repacked")
@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize("cast", CASTS)
def test_cast(cast: str, name: str, originals: dict[str, Path], tmp_path: Path) -> None:
    model, twin = (load(folder) for folder in (originals[name], originals[name].parent / "float"))
    logits(model)
    expected = logits(twin)
    for each in (model, twin):
        CASTS[cast](nn.ModuleDict({"user's": each}))
    assert relative_error(logits(model), expected) < 0.03
    layers = [layer for layer in model.modules() if isinstance(layer, (QuantLinear, QuantExperts))]
    assert {layer.dtype for layer in layers} <= {twin.model.layers[0].self_attn.q_proj.weight.dtype, torch.float32}
    model.save_pretrained(tmp_path / "saved")
    found, expected = packed_state(tmp_path / "saved"), packed_state(originals[name])
    assert found.keys() == expected.keys()
    assert not [key for key in found if found[key].dtype != expected[key].dtype or not found[key].equal(expected[key])]


@pytest.mark.usefixtures("repacked")
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_no_parameter_is_packed(name: str, originals: dict[str, Path]) -> None:
    """So nothing that loops over parameters, counts them or asks them for gradients meets codes."""
    model = load(originals[name], dtype=torch.float16)
    assert all(parameter.is_floating_point() for parameter in model.parameters())
    assert not [own for own, _ in model.named_parameters() if "_proj" in own and not own.endswith("gate.weight")]
    model.requires_grad_(True)
    assert any("q_proj" in own for own in model.state_dict())


def reloaded(model: Any, assign: bool) -> Any:
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=assign)
    return model


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "state dict": lambda model: reloaded(model, assign=False),
    "assigned state dict": lambda model: reloaded(model, assign=True),
}


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize("how", COPIES)
def test_copy(how: str, name: str, originals: dict[str, Path]) -> None:
    model = load(originals[name])
    expected = logits(model)
    assert logits(COPIES[how](model)).equal(expected)
