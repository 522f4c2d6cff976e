"""``Accelerator.save_model``: of a packed model it writes what loads again; bare state dicts say what they are."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_model
from support.checkpoints import write_pair
from support.gptq import Recipe
from support.loading import load
from support.models import logits, tiny
from support.repacking import repacked  # noqa: F401 - a fixture

from graftq.quant_linear import packed_module
from graftq.quant_linear.errors import CheckpointError
from graftq.quant_linear.linear import QuantLinear

ON_DISK = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "disk"}
ON_DISK |= {"model.rotary_emb": "cpu", "lm_head": "disk"}


def saved(model: Any, folder: Path, **options: Any) -> Path:
    Accelerator(cpu=True).save_model(model, folder, **options)
    model.config.save_pretrained(folder)
    return folder


@pytest.mark.usefixtures("repacked")
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_loads_again(name: str, originals: dict[str, Path], tmp_path: Path) -> None:
    model = load(originals[name])
    expected = logits(model)
    folder = saved(model, tmp_path / "saved", max_shard_size="40KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    names = {name for file in folder.glob("*.safetensors") for name in load_file(file)}
    assert "model.layers.0.self_attn.q_proj.qweight" in names
    assert logits(load(folder)).equal(expected)
    assert logits(model).equal(expected)


def test_routers(tmp_path: Path) -> None:
    checkpoint = write_pair(tmp_path, tiny("mixtral"), Recipe(), only=r"(proj|w[123]|gate)$")
    folder = saved(load(checkpoint), tmp_path / "saved")
    assert "model.layers.0.mlp.gate.qweight" in load_file(folder / "model.safetensors")
    assert logits(load(folder)).equal(logits(load(checkpoint)))


def test_offloaded(originals: dict[str, Path], tmp_path: Path) -> None:
    model = load(originals["llama"], device_map=ON_DISK, offload_folder=tmp_path / "offloaded")
    folder = saved(model, tmp_path / "saved")
    found, stored = (load_file(each / "model.safetensors") for each in (folder, originals["llama"]))
    assert found.keys() == stored.keys()
    assert not [name for name in stored if not stored[name].equal(found[name])]


def test_others_are_saved_as_before(originals: dict[str, Path], tmp_path: Path) -> None:
    Accelerator(cpu=True).save_model(torch.nn.Linear(2, 3), tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == {"weight", "bias"}


@pytest.mark.usefixtures("repacked")
def test_state_dicts_say_what_they_are(
    originals: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = load(originals["llama"])
    assert any(isinstance(module, QuantLinear) for module in model.modules())
    packed_module._say_once.cache_clear()
    with caplog.at_level(logging.INFO, "graftq"):
        model.save_pretrained(tmp_path)
        saved(model, tmp_path / "again")
        assert not caplog.records
        model.state_dict()
        model.state_dict()
    [record] = caplog.records
    assert "state_dict() of a packed model has tensors in the layout of this machine's kernels" in record.getMessage()
    assert "save_pretrained() writes the checkpoint" in record.getMessage()


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_what_safetensors_writes_is_refused(name: str, originals: dict[str, Path], tmp_path: Path) -> None:
    model = load(originals[name])
    save_model(model, str(tmp_path / "model.safetensors"), metadata={"format": "pt"})
    model.config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"proj: in a kernel's layout, as state_dict\(\)"):
        load(tmp_path)
