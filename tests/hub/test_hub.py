"""Checkpoints on a Hub: branches, the cache, offline mode, odd file names; by the real client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from support.checkpoints import write_pair
from support.gptq import Recipe
from support.hub import Hub, serve
from support.loading import load
from support.models import logits, relative_error, tiny
from support.processes import ROOT, run

REPO = "someone/Model-GPTQ"
REAL = "main"
SMALL = {
    "gptq-3bit-32g-actorder_True": ("llama", Recipe(bits=3, sym=False), "TheBloke's"),
    "gptq-4bit--1g": ("mixtral", Recipe(group_size=-1), "AutoGPTQ's"),
    "gptq-8bit-32g": ("llama", Recipe(bits=8, desc_act=False), "sharded"),
}

# In one process for all branches, as every further one would import transformers again.
LOAD = f"""
import sys
import numpy as np, torch
from transformers import AutoModelForCausalLM
from support.models import logits
for branch, target in zip(sys.argv[1::2], sys.argv[2::2]):
    model, info = AutoModelForCausalLM.from_pretrained(
        {REPO!r}, revision=branch, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    np.save(target, logits(model).numpy())
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The checkpoint of each branch; for all but the real one, a float twin lies beside it."""
    made = {REAL: ROOT / "examples" / "tiny-mixtral-gptq"}
    for branch, (architecture, recipe, layout) in SMALL.items():
        made[branch] = write_pair(tmp_path_factory.mktemp("branch"), tiny(architecture), recipe, layout=layout)
    return made


@pytest.fixture(scope="module")
def hub(folders: dict[str, Path]) -> Iterator[Hub]:
    with serve(REPO, folders) as running:
        yield running


def at(hub: Hub, cache: Path, offline: bool = False) -> dict[str, str]:
    """The environment of a process that has its own cache, and ``hub`` for a Hub."""
    return {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": str(int(offline)),
        "NO_PROXY": "127.0.0.1",
        "HF_TOKEN": "",
    }


@pytest.fixture(scope="module")
def loaded(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """The cache after all branches were loaded by the plain call, and the logits."""
    cache = tmp_path_factory.mktemp("cache")
    return cache, load_all(hub, cache, tmp_path_factory.mktemp("logits"))


def load_all(hub: Hub, cache: Path, target: Path, offline: bool = False) -> dict[str, torch.Tensor]:
    files = {branch: target / f"{number}.npy" for number, branch in enumerate(hub.branches)}
    pairs = [argument for branch, file in files.items() for argument in (branch, str(file))]
    run("-c", LOAD, *pairs, path=[ROOT / "tests"], **at(hub, cache, offline))
    return {branch: torch.from_numpy(np.load(file)) for branch, file in files.items()}


@pytest.mark.parametrize("branch", [REAL, *SMALL])
def test_each_branch_has_its_own_logits(
    branch: str, loaded: tuple[Path, dict[str, torch.Tensor]], folders: dict[str, Path]
) -> None:
    """The real checkpoint's are held against its loading from the folder, which has ground truth of its own."""
    twin = folders[branch] if branch == REAL else folders[branch].parent / "float"
    assert relative_error(loaded[1][branch], logits(load(twin))) < 1e-5


def test_offline_from_the_cache(hub: Hub, loaded: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    cache, online = loaded
    asked = len(hub.requests)
    offline = load_all(hub, cache, tmp_path, offline=True)
    assert len(hub.requests) == asked
    assert all(offline[branch].equal(online[branch]) for branch in hub.branches)


def inspect(hub: Hub, cache: Path, *arguments: str, offline: bool = False) -> tuple[int, str, str]:
    done = run("-m", "graftq.plugin.cli.main", "inspect", *arguments, check=False, **at(hub, cache, offline))
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("branch", "wanted"),
    [
        (REAL, "4 bits, group -1, act-order, symmetric, format gptq"),
        ("gptq-3bit-32g-actorder_True", "3 bits, group 32, act-order, asymmetric, format gptq"),
        ("gptq-4bit--1g", "the weights are called gptq_model-4bit--1g.safetensors"),
        ("gptq-8bit-32g", "weights      model.safetensors.index.json"),
    ],
)
def test_inspect_downloads_headers_only(branch: str, wanted: str, hub: Hub, tmp_path: Path) -> None:
    hub.requests.clear()
    status, out, err = inspect(hub, tmp_path, REPO, "--revision", branch)
    assert (status, err) == (0, "")
    assert wanted in out
    assert "as declared; the values were not read" in out
    size = sum(path.stat().st_size for path in hub.branches[branch].glob("*.safetensors"))
    assert 0 < hub.sent(".safetensors") <= min(200_000, size)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_inspect_reads_values_from_the_cache(hub: Hub, loaded: tuple[Path, dict[str, torch.Tensor]]) -> None:
    status, out, _ = inspect(hub, loaded[0], REPO, "--revision", "gptq-3bit-32g-actorder_True", offline=True)
    assert status == 0
    assert "yes, seen in 14 of 14 modules" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([REPO, "--revision", "no-such-branch"], f"{REPO}@no-such-branch: neither a folder nor a readable repository"),
        (["someone/else"], "someone/else: neither a folder nor a readable repository"),
        (["not//a name"], "not/a name: neither a folder nor a readable repository"),
    ],
    ids=["no such branch", "no such repository", "no name"],
)
def test_inspect_says_what_is_missing(arguments: list[str], said: str, hub: Hub, tmp_path: Path) -> None:
    status, out, err = inspect(hub, tmp_path, *arguments)
    assert (status, out) == (1, "")
    assert err.startswith(f"graftq: {said}")
    assert "Traceback" not in err


def test_a_model_that_is_not_quantised_loads_as_before(folders: dict[str, Path], tmp_path: Path) -> None:
    """graftq asks for one file more, and minds neither its absence nor what else there is."""
    plain = folders["gptq-8bit-32g"].parent / "float"
    assert "quantization_config" not in json.loads((plain / "config.json").read_text())
    with serve(REPO, {"main": plain}) as hub:
        found = load_all(hub, tmp_path / "cache", tmp_path)
    assert found["main"].equal(logits(load(plain)))
