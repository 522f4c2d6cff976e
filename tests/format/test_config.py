"""Parameters as AutoGPTQ, optimum and GPTQModel write them."""

from __future__ import annotations

from typing import Any

import pytest

from graftq.plugin.checkpoint.configuration import QuantConfig
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
