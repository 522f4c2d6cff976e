"""Damaged and hostile checkpoints raise a CheckpointError that names file, tensor and reason, and give no model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import edit, edit_config, write_pair
from support.gptq import Recipe
from support.loading import load
from support.models import tiny
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from graftq.quant_linear.errors import CheckpointError

Copy = Callable[[str], Path]
State = dict[str, torch.Tensor]

UP = "model.layers.1.mlp.up_proj"
W1 = "model.layers.1.block_sparse_moe.experts.2.w1"


def drop(name: str) -> Callable[[State], object]:
    return lambda state: state.pop(name)


def drop_all(prefix: str) -> Callable[[State], object]:
    return lambda state: [state.pop(name) for name in list(state) if name.startswith(prefix)]


def put(name: str, value: float) -> Callable[[State], object]:
    return lambda state: state[name].view(-1).__setitem__(0, value)


def retype(name: str, dtype: torch.dtype) -> Callable[[State], object]:
    return lambda state: state.__setitem__(name, state[name].to(dtype))


def cut(name: str, rows: int) -> Callable[[State], object]:
    return lambda state: state.__setitem__(name, state[name][:-rows])


TENSORS: dict[str, tuple[str, Callable[[State], object], str]] = {
    "g_idx out of range": ("llama", put(f"{UP}.g_idx", 99), rf"{UP}\.g_idx: group 99 out of range"),
    "g_idx negative": ("llama", put(f"{UP}.g_idx", -2), rf"{UP}\.g_idx: group -2 out of range"),
    "g_idx negative in an expert": ("mixtral", put(f"{W1}.g_idx", -2), rf"{W1}\.g_idx: group -2 out of range"),
    "qweight too short": ("llama", cut(f"{UP}.qweight", 2), rf"{UP}: .*qweight has 6 rows"),
    "scales too short": ("llama", cut(f"{UP}.scales", 1), rf"{UP}: .*scales has 1 rows"),
    "qweight of floats": ("llama", retype(f"{UP}.qweight", torch.float32), rf"{UP}\.qweight: dtype F32, expected I32"),
    "scales of integers": ("llama", retype(f"{UP}.scales", torch.int32), rf"{UP}\.scales: dtype I32"),
    "a bias of bits": ("llama", retype(f"{UP}.bias", torch.bool), rf"{UP}\.bias: dtype BOOL, expected F16"),
    "a bias in 8 bits": (
        "llama",
        retype(f"{UP}.bias", torch.float8_e4m3fn),
        rf"{UP}\.bias: dtype F8_E4M3, expected F16",
    ),
    "a bias in double precision": (
        "mixtral",
        retype(f"{W1}.bias", torch.float64),
        rf"{W1}\.bias: dtype F64, expected F16",
    ),
    "scales missing": ("llama", drop(f"{UP}.scales"), rf"{UP}: scales missing"),
    "qzeros missing": ("llama", drop(f"{UP}.qzeros"), rf"{UP}: qzeros missing"),
    "qweight missing": ("llama", drop(f"{UP}.qweight"), rf"{UP}: qweight missing"),
    "scales missing in an expert": ("mixtral", drop(f"{W1}.scales"), rf"{W1}: scales missing"),
    "an expert missing": (
        "mixtral",
        drop_all("model.layers.1.block_sparse_moe.experts.2."),
        r"experts\.2\.\w+: missing",
    ),
    "a projection of an expert missing": ("mixtral", drop_all(W1), r"experts\.2\.gate_proj: missing"),
    "all experts of a layer missing": (
        "mixtral",
        drop_all("model.layers.1.block_sparse_moe.experts."),
        r"layers\.1\.mlp\.experts\.\w+: no tensor in the checkpoint",
    ),
    "a layer missing": ("llama", drop_all(UP), rf"{UP}\.weight: no tensor in the checkpoint for this weight"),
    "a norm missing": ("llama", drop("model.norm.weight"), r"model\.norm\.weight: no tensor in the checkpoint"),
    "lm_head missing": ("llama", drop("lm_head.weight"), r"lm_head\.weight: no tensor in the checkpoint"),
    "a norm too short": ("llama", cut("model.norm.weight", 8), r"model\.norm\.weight: shape \[56\], .* has \[64\]"),
    "an embedding of integers": (
        "llama",
        retype("model.embed_tokens.weight", torch.int32),
        r"embed_tokens\.weight: dtype I32 for a weight of floats",
    ),
    "NaN scale": ("llama", put(f"{UP}.scales", float("nan")), rf"{UP}\.scales: NaN values"),
    "infinite scale": ("mixtral", put(f"{W1}.scales", float("inf")), rf"{W1}\.scales: infinite values"),
    "non-zero bias": ("mixtral", put(f"{W1}.bias", 1.0), rf"{W1}\.bias: non-zero bias"),
}


@pytest.mark.parametrize("what", TENSORS)
def test_tensors(what: str, copy: Copy) -> None:
    name, damage, message = TENSORS[what]
    checkpoint = copy(name)
    edit(checkpoint, damage)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(checkpoint, device_map="auto")
    assert str(checkpoint / "model.safetensors") in str(caught.value)


CONFIGS: dict[str, tuple[dict[str, object], str]] = {
    "bits 5": ({"bits": 5}, r"config\.json: bits is 5; GPTQ has 2, 3, 4, 8"),
    "bits missing": ({"bits": None}, r"config\.json: bits missing"),
    "bits a word": ({"bits": "four"}, r"config\.json: bits is 'four', not an integer"),
    "bits contradict the tensors": ({"bits": 8}, "says 8 bits, .*the tensors show 4"),
    "group contradicts the tensors": ({"group_size": 16}, "says group_size 16"),
    "one group contradicts the tensors": ({"group_size": -1}, "says group_size -1"),
    "group_size 0": ({"group_size": 0}, r"config\.json: group_size is 0"),
    "v2 label on v1 zeros": ({"checkpoint_format": "gptq_v2"}, "labeled gptq_v2"),
    "an unknown method": ({"quant_method": "gtpq"}, r"quant_method is 'gtpq'"),
    "an unknown format": ({"checkpoint_format": "exl2"}, r"checkpoint_format is 'exl2'"),
    "dynamic no object": ({"dynamic": ["x"]}, r"config\.json: dynamic is a list"),
    "dynamic no expression": ({"dynamic": {"+:(": {}}}, r"config\.json: dynamic rule '\+:\(' is not a regular"),
}


@pytest.mark.parametrize("alone", [True, False], ids=["in quantize_config.json", "in config.json"])
@pytest.mark.parametrize("what", CONFIGS)
def test_configurations(what: str, alone: bool, copy: Copy) -> None:
    changes, message = CONFIGS[what]
    checkpoint = copy("llama")
    edit_config(checkpoint, **changes)
    if alone:
        config = json.loads((checkpoint / "config.json").read_text())
        del config["quantization_config"]
        (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        load(checkpoint)


def declare(checkpoint: Path, parameters: object, part: str | None = None) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (config.setdefault(part, {}) if part else config)["quantization_config"] = parameters
    if part:
        del config["quantization_config"]
    (checkpoint / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("loader", [AutoModelForCausalLM, LlamaForCausalLM, AutoConfig], ids=lambda each: each.__name__)
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "beside quantize_config.json"])
@pytest.mark.parametrize("parameters", ["gptq", "", [{"bits": 4}], 4], ids=["a text", "no text", "a list", "a number"])
def test_parameters_are_no_object(parameters: object, alone: bool, loader: Any, copy: Copy) -> None:
    checkpoint = copy("llama")
    declare(checkpoint, parameters)
    if alone:
        (checkpoint / "quantize_config.json").unlink()
    kind = type(parameters).__name__
    with pytest.raises(CheckpointError, match=rf"gptq/config\.json: quantization_config is a {kind}, not an object"):
        loader.from_pretrained(checkpoint)


def test_parameters_of_the_language_model_are_no_object(copy: Copy) -> None:
    checkpoint = copy("llama")
    declare(checkpoint, "gptq", "text_config")
    with pytest.raises(CheckpointError, match="quantization_config is a str, not an object"):
        load(checkpoint)


def test_parameters_of_a_float_checkpoint_are_left_to_transformers(copy: Copy) -> None:
    plain = copy("llama").parent / "float"
    declare(plain, "gptq")
    with pytest.raises(AttributeError, match="'str' object has no attribute 'to_dict'"):
        load(plain)


def test_quantize_config_is_not_json(tmp_path: Path) -> None:
    checkpoint = write_pair(tmp_path, tiny("llama"), Recipe(), layout="AutoGPTQ's")
    (checkpoint / "quantize_config.json").write_text("{bits: 4")
    with pytest.raises(CheckpointError, match=r"quantize_config\.json: not valid JSON"):
        load(checkpoint)


def test_no_parameters_anywhere(copy: Copy) -> None:
    checkpoint = copy("llama")
    (checkpoint / "quantize_config.json").unlink()
    config = json.loads((checkpoint / "config.json").read_text())
    del config["quantization_config"]
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"packed weights, but there is no quantize_config\.json"):
        load(checkpoint)


@pytest.mark.parametrize("keep", [0, 4, 5000, -100], ids=["empty", "4 bytes", "5000 bytes", "100 bytes short"])
def test_truncated_file(keep: int, copy: Copy) -> None:
    file = copy("llama") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*truncated"):
        load(file.parent)


def test_header_is_garbage(copy: Copy) -> None:
    file = copy("llama") / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[8:12] = b"\xff\x00}{"
    file.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: malformed safetensors header"):
        load(file.parent)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_pair(tmp_path, tiny("llama"), Recipe(), layout="sharded")


def test_a_file_of_the_index_is_absent(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors: .*absent"):
        load(sharded)


def test_a_tensor_of_the_index_is_absent(sharded: Path) -> None:
    file = sharded / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["model.layers.0.mlp.gate_proj.extra"] = "model-00001-of-00002.safetensors"
    file.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"00001-of-00002\.safetensors: .*extra: the index promises this tensor"):
        load(sharded)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {"a": 3}}'])
def test_the_index_is_damaged(content: str, sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json: "):
        load(sharded)


def test_the_index_points_outside(sharded: Path) -> None:
    file = sharded / "model.safetensors.index.json"
    file.write_text(file.read_text().replace("model-00001", "../model-00001"))
    with pytest.raises(CheckpointError, match="names a file outside"):
        load(sharded)


def test_a_state_dict_instead_of_files(copy: Copy) -> None:
    from transformers import AutoConfig, LlamaForCausalLM

    config = AutoConfig.from_pretrained(copy("llama"))
    with pytest.raises(CheckpointError, match="loaded from files"):
        LlamaForCausalLM.from_pretrained(None, config=config, state_dict={})


def test_two_modules_of_the_files_are_one_of_the_model(copy: Copy) -> None:
    def double(state: State) -> None:
        old, new = "block_sparse_moe.experts.2.w1.", "mlp.experts.2.gate_proj."
        state.update({name.replace(old, new): tensor.clone() for name, tensor in state.items() if old in name})

    checkpoint = copy("mixtral")
    edit(checkpoint, double)
    with pytest.raises(CheckpointError, match=r"this and .* are both model\.layers\.0\.mlp\.experts\.2\.gate_proj"):
        load(checkpoint)


@pytest.mark.parametrize(
    "number", ["9" * 5000, "\u00b2", "\u0663", "03", "-3", "3 "], ids=lambda text: ascii(text)[:10]
)
def test_a_number_of_an_expert_that_is_none(number: str, copy: Copy) -> None:
    """Python takes some of these for digits, and refuses to read, or reads as the number of another expert."""

    def add(state: State) -> None:
        new = {name.replace(".experts.3.", f".experts.{number}."): tensor.clone() for name, tensor in state.items()}
        state.update({name: tensor for name, tensor in new.items() if f".{number}." in name})

    checkpoint = copy("mixtral")
    edit(checkpoint, add)
    with pytest.raises(CheckpointError, match=r"experts\."):
        load(checkpoint)
