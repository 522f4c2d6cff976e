"""Parameters as AutoGPTQ, optimum and GPTQModel write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from graftq.plugin.checkpoint.configuration import QuantConfig
from graftq.plugin.checkpoint.source import Source
from graftq.plugin.checkpoint.weight_files import read_weight_map
from graftq.quant_linear.errors import CheckpointError

PLAIN: dict[str, Any] = {"bits": 4, "group_size": 128, "desc_act": True, "sym": True}


def read(**changes: Any) -> QuantConfig:
    return QuantConfig.from_dict({**PLAIN, **changes}, "quantize_config.json")


def test_what_is_declared() -> None:
    declared = read().declared
    assert (declared.bits, declared.group_size, declared.desc_act, declared.sym) == (4, 128, True, True)


def test_what_is_absent_is_unknown() -> None:
    declared = QuantConfig.from_dict({"bits": 4}, "f").declared
    assert (declared.group_size, declared.desc_act, declared.sym) == (None, False, None)


@pytest.mark.parametrize("key", ["checkpoint_format", "format"])
@pytest.mark.parametrize(("name", "offset"), [("gptq", 1), ("GPTQ_V2", 0), (None, 1)])
def test_zero_points(key: str, name: str | None, offset: int) -> None:
    assert read(**{key: name}).declared.zero_offset == offset


@pytest.mark.parametrize("changes", [{"is_marlin_format": True}, {"checkpoint_format": "gptq", "format": "gptq_v2"}])
def test_formats_that_contradict(changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"quantize_config\.json: .*(format|formats)"):
        read(**changes)


@pytest.mark.parametrize("key", ["quant_method", "method"])
def test_other_methods(key: str) -> None:
    with pytest.raises(CheckpointError, match="quant_method is 'awq', not 'gptq'"):
        read(**{key: "awq"})


def test_names_of_weight_files() -> None:
    assert read(model_file_base_name="a", model_basename="b").weight_names == ("a", "b", "gptq_model-4bit-128g")


DYNAMIC = {
    r"-:.*gate$": {},
    r"+:.*\.18\..*": {"bits": 8, "group_size": 64},
    r".*\.18\..*": {"bits": 2},
    r"lm_head": {"bits": 8},
}


@pytest.mark.parametrize(
    ("module", "bits", "group_size"),
    [("model.layers.18.q", 8, 64), ("model.layers.1.q", 4, 128), ("lm_head", 8, 128), ("model.lm_head", 4, 128)],
)
def test_the_first_dynamic_rule_that_matches_from_the_start(module: str, bits: int, group_size: int) -> None:
    declared = read(dynamic=DYNAMIC).for_module(module)
    assert (declared.bits, declared.group_size) == (bits, group_size)


STRANGE: dict[str, Any] = {
    "bits": ["²", "--4", "", " 4", True, 4.0, [4], {}, 10**30, float("inf")],
    "group_size": ["²", "128g", 0, -2, False, 10**12, [128]],
    "desc_act": ["false", 2, [], 1.0, {}],
    "sym": ["true", -1],
    "quant_method": [0, False, ["gptq"], {}, "gtpq", "mxfp4", "gptq\x1b[2J"],
    "checkpoint_format": [5, ["gptq"], "marlin"],
    "model_file_base_name": ["../x", "/x", "a/b", "..", ".", "a\\b", "C:x", "a\0", "a" * 250, "\ud800", 5, ["a"]],
    "dynamic": [5, "x", ["x"], {".*": None}, {".*": {"bits": "x"}}, {".*": {"desc_act": "no"}}],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in STRANGE.items() for value in values])
def test_strange_values_are_named(key: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=rf"quantize_config\.json: .*{key}") as caught:
        read(**{key: value})
    assert str(caught.value).isprintable()


HARMLESS: dict[str, Any] = {
    "quant_method": ["GPTQ", "Gptq", " gptq ", "", " ", None],
    "bits": ["4"],
    "group_size": ["128"],
    "desc_act": [1],
    "checkpoint_format": ["GPTQ", "", None],
    "dynamic": [None, {}, {".*": {"bits": "4", "group_size": "128", "desc_act": None}}],
    "dataset": ["ptb"],
    "self": [1],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in HARMLESS.items() for value in values])
def test_harmless_spellings(key: str, value: Any) -> None:
    assert read(**{key: value}).for_module("a") == read().declared


def test_an_index_names_files_of_its_own_folder(tmp_path: Path) -> None:
    for name in ("../a.safetensors", "/a.safetensors", "b\\a.safetensors", "a" * 260, "", "a.bin"):
        (tmp_path / "i").write_text(json.dumps({"weight_map": {"x": name}}))
        with pytest.raises(CheckpointError, match="i: the index names"):
            read_weight_map(Source(str(tmp_path)), "i")


NEWER: dict[str, Any] = {
    "method": "gptq",
    "format": "gptq",
    "checkpoint_format": "gptq",
    "pack_dtype": "int32",
    "lm_head": True,
    "activation": {"mode": "w4afp8", "attention": {"mode": "w4afp8"}},
    "adapter": {"name": "lora", "rank": 64},
    "act_group_aware": True,
    "mse": 0.0,
    "static_groups": False,
    "meta": {"quantizer": ["gptqmodel:7.7.0"], "fallback": {"strategy": "rtn", "threshold": "0.5%"}, "moe": {}},
}


def test_fields_that_mean_nothing_for_loading() -> None:
    assert read(**NEWER).declared == read().declared


@pytest.mark.parametrize("bits", [3, 4, 5, 6, 7])
@pytest.mark.parametrize("key", ["checkpoint_format", "format"])
def test_planar_packing_is_refused_by_name(key: str, bits: int) -> None:
    with pytest.raises(CheckpointError, match=r"checkpoint_format is 'gptq_p', GPTQModel's planar packing for 5 to 7"):
        read(**{key: "gptq_p"}, bits=bits)


@pytest.mark.parametrize("rotation", ["hadamard", "random", True])
def test_rotated_inputs_are_refused(rotation: Any) -> None:
    with pytest.raises(CheckpointError, match=r"rotation is .*: inputs are to be rotated at run time"):
        read(rotation=rotation)
    assert read(rotation=None).declared == read().declared
