"""Saving over an older checkpoint: what loads is the new one, and until it is complete, the old one."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import edit_config
from support.loading import load
from support.models import logits
from support.processes import TESTS, run

from graftq.adapters.auto_gptq import AutoGPTQForCausalLM
from graftq.adapters.transformers.saving import save_quantized

SHARDS = "80KB"


def save(model: Any, folder: Path, **arguments: Any) -> None:
    model.save_pretrained(folder, **arguments)


def save_in_shards(model: Any, folder: Path) -> None:
    save(model, folder, max_shard_size=SHARDS)


def save_quantized_in_shards(model: Any, folder: Path) -> None:
    save_quantized(model, folder, max_shard_size=SHARDS)


def save_by_hand(model: Any, folder: Path) -> None:
    """Weights under a name that ``quantize_config.json`` alone knows."""
    save(model, folder)
    (folder / "model.safetensors").rename(folder / "weights-by-hand.safetensors")
    edit_config(folder, model_file_base_name="weights-by-hand")


WAYS = {
    "one file": save,
    "shards": save_in_shards,
    "AutoGPTQ's file": save_quantized,
    "AutoGPTQ's shards": save_quantized_in_shards,
}
OLD = {**WAYS, "a file named by hand": save_by_hand}


class KilledError(BaseException):
    """Stands for SIGKILL where every step is tried, right before a file is renamed, linked or removed."""


def kill_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the ``step``-th change to the folder of an older checkpoint be the first that does not happen."""
    steps = count()

    def fatal(change: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any, **kwargs: Any) -> Any:
            if next(steps) >= step:
                raise KilledError
            return change(*args, **kwargs)

        return counting

    for owner, name in ((Path, "replace"), (Path, "unlink"), (os, "link")):
        monkeypatch.setattr(owner, name, fatal(getattr(owner, name)))


@pytest.fixture
def models(originals: dict[str, Path]) -> tuple[Any, Any]:
    """A model, and what it has been trained to: both are right, and they differ."""
    old, new = load(originals["llama"]), load(originals["llama"])
    with torch.no_grad():
        for name, parameter in new.named_parameters():
            if parameter.is_floating_point() and "norm" in name:
                parameter.mul_(1.5)
    return old, new


def weights(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if "safetensors" in path.name}


@pytest.mark.parametrize("after", WAYS)
@pytest.mark.parametrize("before", OLD)
def test_killed_at_any_step(
    before: str, after: str, models: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = models
    OLD[before](old, tmp_path / "before")
    WAYS[after](new, tmp_path / "alone")
    expected = {"old": logits(old), "new": logits(new)}
    seen = []
    for step in count():
        folder = tmp_path / str(step)
        shutil.copytree(tmp_path / "before", folder)
        with monkeypatch.context() as patch:
            kill_at(step, patch)
            try:
                WAYS[after](new, folder)
                is_done = True
            except KilledError:
                is_done = False
        found = logits(load(folder))
        seen.append(next(name for name, value in expected.items() if value.equal(found)))
        if is_done:
            break
        shutil.rmtree(folder)
    assert seen == sorted(seen, reverse=True)  # first the old one, then the new one, and never back
    assert seen[0] == "old"
    assert seen[-1] == "new"
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        path.name for path in (tmp_path / "alone").iterdir()
    )


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_killed_for_real(originals: dict[str, Path], tmp_path: Path) -> None:
    script = TESTS / "support" / "killed_saves.py"
    done = run(str(script), str(originals["llama"]), str(tmp_path), "6", "0", path=[TESTS], OMP_NUM_THREADS="1")
    rounds = [tuple(line.split(": ", 1)) for line in done.stdout.splitlines()]
    assert len(rounds) == 6
    assert {found for _, found in rounds} <= {"old", "new"}, rounds
    assert any(moment != "never" for moment, _ in rounds), rounds


def test_a_save_that_fails_leaves_nothing(
    models: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = models
    save_in_shards(old, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        save(new, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_without_hard_links(models: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("Operation not permitted")

    old, new = models
    save_in_shards(old, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", fail)
        save_in_shards(new, tmp_path)
    assert logits(load(tmp_path)).equal(logits(new))
    save_in_shards(old, tmp_path)
    assert logits(load(tmp_path)).equal(logits(old))
    names = weights(tmp_path)
    weight_map = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert names == {"model.safetensors.index.json", *weight_map.values()}


@pytest.mark.parametrize("damaged", ["model.safetensors.index.json", "config.json", "quantize_config.json"])
def test_over_a_damaged_checkpoint(damaged: str, models: tuple[Any, Any], tmp_path: Path) -> None:
    old, new = models
    save_in_shards(old, tmp_path)
    (tmp_path / damaged).write_text("{")
    save(new, tmp_path)
    assert logits(load(tmp_path)).equal(logits(new))
    assert weights(tmp_path) == {"model.safetensors"}


def test_files_of_others_stay(models: tuple[Any, Any], tmp_path: Path) -> None:
    others = ["tokenizer.json", "adapter_model.safetensors", "other-00001-of-00002.safetensors", "pytorch_model.bin"]
    for name in others:
        (tmp_path / name).write_text("{}")
    save_in_shards(models[0], tmp_path)
    save(models[1], tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= set(others)


def test_autogptqs_own_method(models: tuple[Any, Any], originals: dict[str, Path], tmp_path: Path) -> None:
    save_quantized_in_shards(models[1], tmp_path)
    model = AutoGPTQForCausalLM.from_quantized(originals["llama"], device="cpu", torch_dtype=torch.float32)
    model.save_quantized(tmp_path)
    assert weights(tmp_path) == {"model.safetensors"}
    assert logits(load(tmp_path)).equal(logits(models[0]))
