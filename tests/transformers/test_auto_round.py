"""Checkpoints that AutoRound writes with GPTQ's tensors; its own package keeps them where that is asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import drop_g_idx, edit, write_pair
from support.gptq import Recipe
from support.loading import assert_right, load
from support.models import logits, tiny
from transformers import AutoRoundConfig

from graftq.plugin.cli.main import main
from graftq.quant_linear.errors import CheckpointError

Q_PROJ, HEAD, DOWN = "model.layers.1.self_attn.q_proj", "lm_head", "model.layers.0.mlp.down_proj"
OWN = {Q_PROJ: Recipe(bits=8, desc_act=False), HEAD: Recipe(bits=8, group_size=-1, desc_act=False), DOWN: None}
EXTRA = {
    Q_PROJ: {"bits": 8},
    HEAD: {"bits": 8, "group_size": -1, "sym": True, "data_type": "int", "act_bits": None},
    r".*layers\.0\.mlp\.down.*": {"bits": 16, "data_type": "float"},
}
PACKINGS = {"gptq": "auto_round:auto_gptq", "gptq_v2": "auto_round:gptqmodel"}


def label(checkpoint: Path, packing: str | None, **changes: Any) -> None:
    """Write the parameters as AutoRound does."""
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {
        "quant_method": "auto-round",
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "data_type": "int",
        "iters": 200,
        "autoround_version": "0.16.1",
        "block_name_to_quantize": "model.layers",
        **({"packing_format": packing} if packing else {}),
        **changes,
    }
    path.write_text(json.dumps(config))
    (checkpoint / "quantize_config.json").unlink(missing_ok=True)


def install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a package auto_round into ``folder``, and that on the path."""
    (folder / "auto_round").mkdir(parents=True)
    (folder / "auto_round" / "__init__.py").write_text('__version__ = "0.1"')
    monkeypatch.syspath_prepend(folder)


@pytest.fixture(scope="module", params=PACKINGS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = Recipe(desc_act=False, sym=True, checkpoint_format=request.param)
    own = {name: one and Recipe(one.bits, one.group_size, False, True, request.param) for name, one in OWN.items()}
    found = write_pair(
        tmp_path_factory.mktemp("auto_round"),
        tiny("llama"),
        recipe,
        overrides=lambda name: own.get(name, recipe),
        only="layers|lm_head",
    )
    label(found, PACKINGS[request.param], extra_config=EXTRA)
    if request.param == "gptq":
        edit(found, drop_g_idx)  # this packing has none
    return found


def test_loads_and_saves_as_it_was(checkpoint: Path, tmp_path: Path) -> None:
    model = assert_right(checkpoint)
    model.save_pretrained(tmp_path / "saved")
    written, read = (json.loads((place / "config.json").read_text()) for place in (tmp_path / "saved", checkpoint))
    assert read["quantization_config"].items() <= written["quantization_config"].items()
    assert logits(load(tmp_path / "saved")).equal(logits(model))
    assert logits(load(checkpoint, config=model.config)).equal(logits(model))


def test_inspected(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(checkpoint)]) == 0
    out = capsys.readouterr().out
    assert "the parameters are AutoRound's, and the packing is that of format gptq" in out
    assert "extra_config has 3 entries" in out


@pytest.mark.parametrize("method", ["intel/auto-round", "auto_round"])
def test_other_spellings(method: str, copy: Callable[[str], Path]) -> None:
    path = copy("llama")
    label(path, None, quant_method=method)
    assert_right(path)


def test_experts(copy: Callable[[str], Path]) -> None:
    path = copy("mixtral")
    label(path, "auto_round:auto_gptq", extra_config={".*mlp.gate$": {"bits": 16}})
    assert_right(path)


@pytest.mark.parametrize("packing", ["auto_round:auto_gptq", "auto_round:gptqmodel"])
@pytest.mark.parametrize("sym", [True, False])
def test_the_other_packings_zero_points_are_refused(packing: str, sym: bool, copy: Callable[[str], Path]) -> None:
    path = copy("llama")
    label(path, packing, sym=sym)
    if packing == "auto_round:auto_gptq":
        assert_right(path)
        return
    with pytest.raises(CheckpointError, match="labeled gptq_v2, but the symmetric zero points are stored as gptq"):
        load(path)


def test_a_module_without_its_entry_is_refused(checkpoint: Path, copy: Callable[[str], Path]) -> None:
    config = (checkpoint / "config.json").read_text()
    changed = json.loads(config)
    del changed["quantization_config"]["extra_config"][Q_PROJ]
    (checkpoint / "config.json").write_text(json.dumps(changed))
    try:
        with pytest.raises(CheckpointError, match=rf"{Q_PROJ}: the configuration says 4 bits, .* show 8"):
            load(checkpoint)
    finally:
        (checkpoint / "config.json").write_text(config)


def test_other_packings_are_refused_by_name(copy: Callable[[str], Path]) -> None:
    path = copy("llama")
    label(path, "auto_round:auto_awq")
    with pytest.raises(CheckpointError, match=r"config\.json: packing_format is 'auto_round:auto_awq', AWQ's packing"):
        load(path)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize(
    ("packing", "arguments"),
    [("auto_round:auto_gptq", {"quantization_config": AutoRoundConfig()}), ("auto_round:auto_awq", {})],
    ids=["asked for", "another packing"],
)
def test_its_own_package_keeps_its_files(
    packing: str,
    arguments: dict[str, Any],
    copy: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """transformers' quantizer for it says what it needs: the package here is too old."""
    install(tmp_path / "packages", monkeypatch)
    path = copy("llama")
    label(path, packing)
    with pytest.raises(ImportError, match="AutoRound quantized model requires auto-round"):
        load(path, **arguments)


def test_graftq_reads_them_also_beside_its_package(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch)
    assert_right(checkpoint)
