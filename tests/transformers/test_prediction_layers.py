"""Packed layers for multi-token prediction, which no model of transformers runs: dropped without a word."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.checkpoints import edit
from support.loading import assert_right, load

from graftq.quant_linear.errors import CheckpointError

State = dict[str, torch.Tensor]
LAST = "model.layers.1."


def adding(prefix: str, layer: bool = True) -> Callable[[State], None]:
    """A change for :func:`edit`: one more layer under ``prefix``, with what joins it to the others."""

    def change(state: State) -> None:
        own = {name.removeprefix(LAST): tensor for name, tensor in state.items() if name.startswith(LAST)}
        state.update({f"{prefix}{name}": tensor.clone() for name, tensor in own.items()})
        if layer:
            state[f"{prefix}enorm.weight"] = torch.ones(64)
            projection = {name: tensor for name, tensor in own.items() if name.startswith("self_attn.o_proj.")}
            for name, tensor in projection.items():
                state[f"{prefix}eh_proj.{name.rpartition('.')[2]}"] = tensor.clone()

    return change


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
@pytest.mark.parametrize(
    ("prefix", "parameters"),
    [
        ("mtp.layers.0.", {}),
        ("model.mtp.layers.0.", {}),
        ("model.mtp_layers.0.", {}),
        ("model.mtp_block.0.", {}),
        ("nextn.", {}),
        ("model.layers.2.", {"num_nextn_predict_layers": 1}),
        ("model.layers.3.", {"num_nextn_predict_layers": 2}),
    ],
)
def test_dropped(
    architecture: str, prefix: str, parameters: dict[str, int], copy: Callable[[str], Path], tmp_path: Path
) -> None:
    path = copy(architecture)
    edit(path, adding(prefix))
    config = path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **parameters}))
    model = assert_right(path)
    model.save_pretrained(tmp_path / "saved")
    load(tmp_path / "saved")


@pytest.mark.parametrize(
    ("layer", "parameters"),
    [(True, {}), (True, {"num_nextn_predict_layers": 0}), (False, {"num_nextn_predict_layers": 1})],
    ids=["not stated", "stated as none", "like any other layer"],
)
def test_a_layer_that_is_none_is_refused(layer: bool, parameters: dict[str, int], copy: Callable[[str], Path]) -> None:
    path = copy("llama")
    edit(path, adding("model.layers.2.", layer))
    config = path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **parameters}))
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.\S+: packed, but the model has no place for it"):
        load(path)
