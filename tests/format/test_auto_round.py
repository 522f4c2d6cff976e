"""AutoRound's parameters: which packings are GPTQ's, and what is said of single modules."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from graftq.plugin.checkpoint.configuration import QuantConfig
from graftq.quant_linear.errors import CheckpointError

PLAIN: dict[str, Any] = {
    "quant_method": "auto-round",
    "packing_format": "auto_round:auto_gptq",
    "bits": 4,
    "group_size": 128,
    "sym": True,
    "data_type": "int",
    "autoround_version": "0.16.1",
    "block_name_to_quantize": "model.layers",
}


def read(**changes: Any) -> QuantConfig:
    raw = {**PLAIN, **changes}
    return QuantConfig.from_dict({key: value for key, value in raw.items() if value is not ...}, "config.json")


@pytest.mark.parametrize("method", ["auto-round", "AutoRound", "intel/auto-round"])
@pytest.mark.parametrize(
    ("packing", "offset"),
    [
        ("auto_round:auto_gptq", 1),
        ("auto_round:gptq", 1),
        ("auto_round:gptq:exllamav2", 1),
        ("auto", 1),
        (..., 1),
        ("auto_round:gptqmodel", 0),
        ("auto_round:gptqmodel:marlin", 0),
    ],
)
def test_packings_that_are_gptq(method: str, packing: Any, offset: int) -> None:
    config = read(quant_method=method, packing_format=packing)
    declared = config.declared
    assert (declared.bits, declared.group_size, declared.sym, declared.zero_offset) == (4, 128, True, offset)
    assert config.method == "auto-round"


def test_packing_of_older_files() -> None:
    assert read(packing_format=..., backend="auto_round:gptq:exllamav2").declared.zero_offset == 1
    with pytest.raises(CheckpointError, match="AutoRound's own packing"):
        read(packing_format=..., backend="auto_round:exllamav2")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"packing_format": "auto_round:auto_awq"}, "'auto_round:auto_awq', AWQ's packing"),
        ({"packing_format": "auto_round:awq"}, "AWQ's packing"),
        ({"packing_format": "auto_round"}, "'auto_round', AutoRound's own packing"),
        ({"packing_format": "auto_round:fp8_static"}, "8-bit floats|AutoRound's own"),
        ({"packing_format": "auto_round:fp8"}, "8-bit floats"),
        ({"packing_format": "auto_round:mx_fp"}, "mx_fp"),
        ({"packing_format": "auto_round:llm_compressor"}, "compressed-tensors' packing"),
        ({"packing_format": "mlx"}, "MLX's packing"),
        ({"data_type": "mx_fp4"}, "data_type is 'mx_fp4', not GPTQ's integers"),
        ({"data_type": "int_asym_dq"}, "not GPTQ's integers"),
        ({"act_bits": 8}, "act_bits is 8: activations are quantized, too"),
        ({"rotation_config": {"hadamard_type": "x"}}, "rotation_config: activations are rotated"),
        ({"hadamard_config": {"block": 128}}, "hadamard_config: activations are rotated"),
        ({"super_bits": 6}, "super_bits is 6: scales are quantized"),
        ({"super_group_size": 16}, "super_group_size is 16: scales are quantized"),
        ({"extra_config": {"a.b": {"bits": 8, "data_type": "fp"}}}, "extra_config 'a.b': data_type is 'fp'"),
        ({"extra_config": {"a.b": {"bits": 4, "act_bits": 4}}}, "extra_config 'a.b': act_bits is 4"),
        ({"bits": 5}, "bits is 5"),
        ({"bits": ...}, "bits missing"),
        ({"packing_format": 5}, "packing_format is 5, not a string"),
    ],
)
def test_what_is_not_gptq_is_named(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^config\.json: .*({why})"):
        read(**changes)


@pytest.mark.parametrize(
    "extra",
    [5, ["a"], {"a": None}, {"a": {"bits": "x"}}, {".*(": {"bits": 8}}, {"a": {"sym": "no"}}, {"a": {"bits": 6}}],
)
def test_strange_overrides_are_named(extra: Any) -> None:
    with pytest.raises(CheckpointError, match=r"^config\.json: extra_config"):
        read(extra_config=extra)


EXTRA: dict[str, Any] = {
    r".*layers\.[01]\..*": {"bits": 2},
    "model.language_model.layers.1.q": {"bits": 8, "group_size": 32},
    "model.layers.3.q": {"bits": 16, "data_type": "float"},
    "lm_head": {"bits": 8, "sym": False, "act_bits": 16, "super_bits": None},
    "k$": {"group_size": 64},
    ".*gate.*": {"bits": 16},
}


@pytest.mark.parametrize(
    ("module", "bits", "group_size", "sym"),
    [
        ("model.layers.0.q", 2, 128, True),
        ("model.language_model.layers.1.q", 8, 32, True),
        ("language_model.model.layers.1.q", 8, 32, True),
        ("model.layers.1.q", 8, 32, True),
        ("model.layers.11.q", 4, 128, True),
        ("model.layers.3.q", 4, 128, True),
        ("lm_head", 8, 128, False),
        ("language_model.lm_head", 8, 128, False),
        ("model.layers.2.k", 4, 64, True),
        ("model.layers.2.gate", 4, 128, True),
        ("model.visual.blocks.3.q", 4, 128, True),
    ],
)
def test_one_module_counts_before_many(module: str, bits: int, group_size: int, sym: bool) -> None:
    config = pickle.loads(pickle.dumps(read(extra_config=EXTRA)))
    declared = config.for_module(module)
    assert (declared.bits, declared.group_size, declared.sym) == (bits, group_size, sym)


def test_many_modules_take_no_time() -> None:
    names = [f"model.layers.{layer}.experts.{expert}.up" for layer in range(60) for expert in range(100)]
    config = read(extra_config={name: {"bits": 8} for name in names})
    assert all(config.for_module(name).bits == 8 for name in names)
    assert config.for_module("model.layers.0.q").bits == 4
