"""``graftq inspect`` on folders: the truth about a checkpoint, its traps, and errors without a traceback."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from support.checkpoints import drop_g_idx, edit, edit_config, write_pair, zero_g_idx
from support.gptq import Recipe
from support.models import tiny
from support.processes import ROOT, run

from graftq.plugin.cli.main import main

Inspect = Callable[[Path], tuple[int, str, str]]
State = dict[str, torch.Tensor]


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one layer: seven projections, act-order in groups of 32."""
    model = tiny("llama", num_hidden_layers=1)
    return write_pair(tmp_path_factory.mktemp("original"), model, Recipe())


@pytest.fixture
def checkpoint(original: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    for file in original.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.fixture
def inspect(capsys: pytest.CaptureFixture[str]) -> Inspect:
    """Run the command in this process: exit status, output, errors."""

    def call(checkpoint: Path) -> tuple[int, str, str]:
        status = main(["inspect", str(checkpoint)])
        return status, *capsys.readouterr()

    return call


def test_the_real_checkpoint(inspect: Inspect) -> None:
    status, out, err = inspect(ROOT / "examples" / "tiny-mixtral-gptq")
    assert (status, err) == (0, "")
    for line in (
        "4 bits, group -1, act-order, symmetric, format gptq",
        "quantized    112 modules, 10,223,616 weights, 4.23 bits each",
        "act-order    no, seen in 0 of 112 modules",
        "32 x model.layers.*.block_sparse_moe.experts.*.w2: 384 -> 256, 4 bits, one group, in order, symmetric -> ",
        "experts bear the names of transformers 4: model.layers.0.block_sparse_moe.experts.0.w1 and 95 more",
    ):
        assert line in out


def test_a_checkpoint_without_traps(inspect: Inspect, checkpoint: Path) -> None:
    status, out, _ = inspect(checkpoint)
    assert status == 0
    assert out.endswith("Traps\n  none\n")
    assert "act-order    yes, seen in 7 of 7 modules" in out


def sorted_g_idx(state: State) -> None:
    for name in [name for name in state if name.endswith("g_idx")]:
        state[name] = state[name].sort().values


def zero_bias(state: State) -> None:
    state["model.layers.0.mlp.up_proj.bias"] = torch.zeros(96, dtype=torch.float16)


def wide_scales(state: State) -> None:
    for name in [name for name in state if name.endswith("scales")]:
        state[name] = state[name].float()


Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "parameters", "trap"),
    [
        (drop_g_idx, {"desc_act": False}, "g_idx is missing"),
        (zero_g_idx, {"desc_act": False}, "g_idx is all zeros, and means no act-order"),
        (sorted_g_idx, {}, "desc_act is true, but g_idx is in order"),
        (None, {"desc_act": False}, "desc_act is false, but g_idx is unordered"),
        (None, {"desc_act": None}, "desc_act is not stated"),
        (zero_bias, {}, "biases of zeros: model.layers.0.mlp.up_proj"),
        (wide_scales, {}, "scales are stored as F32"),
        (None, {"dynamic": {r"+:.*lm_head": {"bits": 8}}}, "1 dynamic rules override parameters by module"),
        (
            None,
            {"modules_in_block_to_quantize": [["self_attn.q_proj"], ["mlp.up_proj"]]},
            "modules_in_block_to_quantize does not name model.layers.0.mlp.down_proj and 4 more",
        ),
    ],
    ids=lambda value: value.partition(":")[0] if isinstance(value, str) else "",
)
def test_trap(
    change: Callable[[State], None] | None,
    parameters: Mapping[str, object],
    trap: str,
    inspect: Inspect,
    checkpoint: Path,
) -> None:
    if change:
        edit(checkpoint, change)
    edit_config(checkpoint, **parameters)
    status, out, _ = inspect(checkpoint)
    assert status == 0
    assert trap in out


@pytest.mark.parametrize(
    ("architecture", "recipe", "arguments", "traps"),
    [
        (
            "llama",
            Recipe(sym=False, checkpoint_format="gptq_v2"),
            {"layout": "AutoGPTQ's"},
            [
                "the parameters are in quantize_config.json alone",
                "the weights are called gptq_model-4bit-32g.safetensors",
                "format gptq_v2",
            ],
        ),
        (
            "mixtral",
            Recipe(bits=8),
            {"only": r"(proj|gate|lm_head)$", "layout": "sharded"},
            [
                "the output embedding is quantized: lm_head",
                "routers are quantized: model.layers.0.block_sparse_moe.gate",
            ],
        ),
        ("llama", Recipe(bits=4, group_size=40), {"only": "mlp.down_proj$"}, ["the last group is not full"]),
    ],
    ids=["AutoGPTQ's files, v2", "head and routers", "ragged group"],
)
def test_traps_of_a_writer(
    architecture: str, recipe: Recipe, arguments: dict[str, str], traps: list[str], inspect: Inspect, tmp_path: Path
) -> None:
    model = tiny(architecture, num_hidden_layers=1)
    status, out, _ = inspect(write_pair(tmp_path, model, recipe, **arguments))  # type: ignore[arg-type]
    assert status == 0
    for trap in traps:
        assert trap in out


def test_two_files_that_contradict_each_other(inspect: Inspect, checkpoint: Path) -> None:
    path = checkpoint / "quantize_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sym": False}))
    assert "sym is True in config.json, but False in quantize_config.json; config.json counts" in inspect(checkpoint)[1]


def test_a_damaged_projection_is_named_and_the_rest_reported(inspect: Inspect, checkpoint: Path) -> None:
    edit(checkpoint, lambda state: state[f"{Q_PROJ}.g_idx"].fill_(99))
    status, out, _ = inspect(checkpoint)
    assert status == 1
    assert f"model.safetensors: {Q_PROJ}.g_idx: group 99 out of range" in out
    assert "1 x model.layers.*.self_attn.k_proj" in out


def truncate(checkpoint: Path) -> None:
    os.truncate(checkpoint / "model.safetensors", 5000)


def only_pickles(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    for name in ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"):
        torch.save({"x": torch.zeros(1)}, checkpoint / name)


def misnamed(checkpoint: Path) -> None:
    """A header of the right length whose first tensor has a name for the terminal to obey, and a wrong shape."""
    header = json.dumps({"x\x1b[2J\n.weight": {"dtype": "F16", "shape": [9], "data_offsets": [0, 2]}}).encode()
    (checkpoint / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(2))


def head_in_eight_bits(checkpoint: Path) -> None:
    edit(checkpoint, lambda state: state.update({"lm_head.weight": torch.zeros(8, 64, dtype=torch.float8_e4m3fn)}))


def no_layers(checkpoint: Path) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": 0}))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncate, "model.safetensors: truncated"),
        (only_pickles, "only pickle files here"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no weight file here"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: not valid JSON"),
        (lambda folder: edit_config(folder, bits=5), "bits is 5"),
        (lambda folder: edit_config(folder, quant_method="awq"), "quant_method is 'awq'"),
        (lambda folder: edit_config(folder, bits="\N{SUPERSCRIPT TWO}"), "not an integer"),
        (lambda folder: edit_config(folder, dynamic={"^((a+)+)+$": {}}), "dynamic rule '^((a+)+)+$' repeats"),
        (lambda folder: edit_config(folder, model_file_base_name="../x"), "model_file_base_name names a file outside"),
        (lambda folder: (folder / "quantize_config.json").write_bytes(b"[" * 99_999), "nested too deeply"),
        (lambda folder: (folder / "config.json").write_text("{}", encoding="utf-16"), "encoded as UTF-16"),
        (head_in_eight_bits, "lm_head.weight: dtype F8_E4M3, which nothing here reads"),
        (no_layers, "packed, but the model has no place for it"),
        (misnamed, r"x\x1b[2J\n.weight has shape"),
    ],
    ids=[
        "truncated",
        "pickle",
        "no weights",
        "bad JSON",
        "5 bits",
        "awq",
        "strange number",
        "slow pattern",
        "a path",
        "nesting",
        "UTF-16",
        "8-bit floats",
        "no layers",
        "escape sequence",
    ],
)
def test_error(damage: Callable[[Path], None], said: str, inspect: Inspect, checkpoint: Path) -> None:
    damage(checkpoint)
    status, out, err = inspect(checkpoint)
    assert (status, out) == (1, "")
    assert err.startswith("graftq: ")
    assert said in err


def test_what_lists_of_modules_hold_is_not_needed(inspect: Inspect, checkpoint: Path) -> None:
    for listed in (5, {"a": 1}, [5], "x"):
        edit_config(checkpoint, modules_in_block_to_quantize=listed)
        assert inspect(checkpoint)[0] == 0


def test_needs_no_transformers(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    absent = tmp_path_factory.mktemp("absent")
    (absent / "transformers.py").write_text("raise ModuleNotFoundError('absent')")
    assert "Traps" in run("-m", "graftq.plugin.cli.main", "inspect", str(checkpoint), path=[absent]).stdout


def test_a_reader_that_has_seen_enough(checkpoint: Path) -> None:
    code = f"""
import subprocess, sys
command = [sys.executable, "-m", "graftq.plugin.cli.main", "inspect", {str(checkpoint)!r}]
with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
    child.stdout.close()
    print(repr(child.stderr.read()))
"""
    assert run("-c", code).stdout == "''\n"
