"""What registering does, and which checkpoints are taken: against a stand-in for vLLM."""

from __future__ import annotations

import importlib
import logging
import pickle
import re
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from support.processes import ROOT
from support.vllm_stand_in import installed

ACT_ORDER = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True, "sym": True}
PLAIN = {**ACT_ORDER, "desc_act": False}


@pytest.fixture
def stand_in() -> Iterator[SimpleNamespace]:
    with installed("0.32.0") as registered:
        yield registered


def register() -> None:
    importlib.import_module("graftq.adapters.vllm").register()


@pytest.fixture
def config(stand_in: SimpleNamespace) -> Any:
    register()
    return stand_in.registry["graftq"]


@pytest.mark.parametrize("version", ["0.30.0", "0.31.2", "0.32.0+cpu", "0.33.1.dev4+gabc"])
def test_registers_once_and_says_so(version: str, caplog: pytest.LogCaptureFixture) -> None:
    with installed(version) as registered, caplog.at_level(logging.INFO, "graftq"):
        register()
        register()
        assert registered.methods.count("graftq") == 1
    (record,) = caplog.records
    assert record.levelname == "INFO"
    assert f"vllm {version}" in record.message
    assert "GRAFTQ_DISABLE=1" in record.message


@pytest.mark.parametrize("version", ["0.29.3", "0.34.0", "1.0", "dev"])
def test_another_version_gets_a_warning_and_nothing_else(version: str, caplog: pytest.LogCaptureFixture) -> None:
    with installed(version) as registered:
        register()
        assert registered.methods == ["gptq", "auto_gptq"]
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "0.30 to 0.33" in record.message
    assert version in record.message


def test_switched_off(
    stand_in: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("GRAFTQ_DISABLE", "1")
    register()
    assert stand_in.methods == ["gptq", "auto_gptq"]
    assert not caplog.records


@pytest.mark.parametrize("gone", ["the name", "its module"])
def test_what_vllm_has_moved_is_named_and_recorded(
    gone: str, stand_in: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from vllm.model_executor.layers import quantization

    from graftq.plugin import failures

    if gone == "the name":
        del quantization.register_quantization_config
    else:
        monkeypatch.setitem(sys.modules, quantization.__name__, None)
    register()
    (record,) = caplog.records
    assert "is left out" in record.message
    assert "vLLM 0.32.0 has no vllm.model_executor.layers.quantization." in record.message
    assert "graftq knows vLLM 0.30 to 0.33" in record.message
    failures.recorded.pop("taking over vLLM's GPTQ loading")


def test_one_file_imports_from_vllm() -> None:
    adapter = ROOT / "adapters" / "vllm"
    importing = [
        path.name for path in adapter.rglob("*.py") if re.search(r"^\s*(from|import) vllm\b", path.read_text(), re.M)
    ]
    assert importing == ["versions.py"]  # for the version alone; stock.py imports by name


def test_import_brings_in_neither_torch_nor_vllm() -> None:
    from support.processes import evaluate

    code = "import sys, graftq.adapters.vllm; print([name for name in ('torch', 'vllm') if name in sys.modules])"
    assert evaluate(code) == ["[]"]


@pytest.mark.parametrize("asked", [None, "gptq", "graftq"])
@pytest.mark.parametrize("raw", [ACT_ORDER, PLAIN, {**PLAIN, "bits": 3}, {**PLAIN, "checkpoint_format": "gptq_v2"}])
def test_takes_all_by_default(config: Any, raw: dict[str, Any], asked: str | None) -> None:
    assert config.override_quantization_method(raw, asked) == "graftq"


@pytest.mark.parametrize("asked", ["auto_gptq", "gptq_marlin", "humming"])
def test_leaves_what_is_asked_of_others(config: Any, asked: str) -> None:
    assert config.override_quantization_method(ACT_ORDER, asked, hf_config=None) is None


@pytest.mark.parametrize(
    "raw",
    [{"quant_method": "awq", "bits": 4}, {**ACT_ORDER, "checkpoint_format": "marlin"}, {"quant_method": "fp8"}],
    ids=["awq", "marlin", "fp8"],
)
def test_leaves_other_formats(config: Any, raw: dict[str, Any]) -> None:
    assert config.override_quantization_method(raw, None) is None


def test_only_unsupported(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFTQ_VLLM", "unsupported")
    refused = [ACT_ORDER, {**PLAIN, "bits": 3}, {**PLAIN, "sym": False}, {**PLAIN, "dynamic": {".*mlp.*": {"bits": 2}}}]
    assert [config.override_quantization_method(raw, None) for raw in refused] == ["graftq"] * 4
    assert config.override_quantization_method(PLAIN, None) is None
    assert config.override_quantization_method({**PLAIN, "dynamic": {"-:.*": {}}}, None) is None
    assert config.override_quantization_method(PLAIN, "graftq") == "graftq"


def test_unknown_switch_is_reported(
    config: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("GRAFTQ_VLLM", "some")
    assert config.override_quantization_method(PLAIN, None) == "graftq"
    assert "GRAFTQ_VLLM=some" in caplog.text


def test_damaged_parameters(config: Any) -> None:
    with pytest.raises(ValueError, match="bits is 5"):
        config.from_config({**ACT_ORDER, "bits": 5})


def test_config_goes_to_workers(config: Any) -> None:
    sent = pickle.loads(pickle.dumps(config.from_config(ACT_ORDER)))
    assert sent.gptq.declared.desc_act


AUTO_ROUND = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4, "group_size": 128}


@pytest.mark.parametrize("packing", ["auto_round:auto_gptq", "auto_round:gptqmodel"])
@pytest.mark.parametrize("asked", [None, "gptq", "graftq"])
def test_takes_auto_rounds_of_gptqs_packing(config: Any, packing: str, asked: str | None) -> None:
    raw = {**AUTO_ROUND, "packing_format": packing, "extra_config": {"lm_head": {"bits": 8}}}
    assert config.override_quantization_method(raw, asked) == "graftq"
    assert config.from_config(raw).gptq.for_module("lm_head").bits == 8


@pytest.mark.parametrize(
    "changes", [{"packing_format": "auto_round:auto_awq"}, {"data_type": "mx_fp"}, {"act_bits": 8}]
)
def test_leaves_auto_rounds_other_packings(config: Any, changes: dict[str, Any]) -> None:
    assert config.override_quantization_method({**AUTO_ROUND, **changes}, None) is None
    assert config.override_quantization_method(AUTO_ROUND, "inc") is None


def test_only_unsupported_of_auto_rounds(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFTQ_VLLM", "unsupported")
    assert config.override_quantization_method(AUTO_ROUND, None) is None
    assert config.override_quantization_method({**AUTO_ROUND, "extra_config": {"a": {"bits": 16}}}, None) is None
    for changes in ({"packing_format": "auto_round:gptqmodel"}, {"bits": 3}, {"extra_config": {"a": {"bits": 2}}}):
        assert config.override_quantization_method({**AUTO_ROUND, **changes}, None) == "graftq"
