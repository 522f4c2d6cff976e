"""What registering does, and which checkpoints are taken: against a stand-in for SGLang."""

from __future__ import annotations

import importlib
import logging
import re
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from support.processes import ROOT, evaluate
from support.sglang_stand_in import HookRegistry, installed

STOCK = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True, "sym": True}
"""What Marlin runs, in any order."""
REFUSED = [{**STOCK, "bits": 3}, {**STOCK, "sym": False}, {**STOCK, "dynamic": {".*mlp.*": {"bits": 2}}}]
WEIGHTS, LOADER, UTILS = (f"sglang.srt.model_loader.{name}" for name in ("weight_utils", "loader", "utils"))


@pytest.fixture(autouse=True)
def switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFTQ_SGLANG", "all")


@pytest.fixture
def stand_in() -> Iterator[SimpleNamespace]:
    with installed() as registered:
        yield registered


def register() -> None:
    importlib.import_module("graftq.adapters.sglang").register()


def first_to_take(methods: dict[str, Any], raw: dict[str, Any], asked: str | None = None) -> str | None:
    """As SGLang asks them: one by one, until one answers."""
    return next(filter(None, (each.override_quantization_method(raw, asked) for each in methods.values())), None)


@pytest.mark.parametrize("version", ["0.5.23", "0.5.23.post1"])
def test_registers_before_the_others_once_and_says_so(version: str, caplog: pytest.LogCaptureFixture) -> None:
    with installed(version) as registered, caplog.at_level(logging.INFO, "graftq"):
        register()
        register()
        assert list(registered.methods) == ["graftq", "awq", "gptq_marlin"]
        assert list(registered.on_cpus) == ["gptq", "graftq"]
        assert registered.choices == ["gptq", "gptq_marlin", "graftq"]
    (record,) = caplog.records
    assert record.levelname == "INFO"
    assert f"sglang {version}" in record.message
    assert "experimental" in record.message
    assert "GRAFTQ_DISABLE=1" in record.message


@pytest.mark.parametrize("version", ["0.5.22", "0.5.24", "0.6.0", "1.0", "dev"])
def test_another_version_gets_a_warning_and_nothing_else(version: str, caplog: pytest.LogCaptureFixture) -> None:
    with installed(version) as registered:
        register()
        assert list(registered.methods) == ["awq", "gptq_marlin"]
    assert not HookRegistry.hooks
    (record,) = caplog.records
    assert "graftq knows SGLang 0.5.23" in record.message
    assert version in record.message


@pytest.mark.parametrize(
    "environment", [{"GRAFTQ_SGLANG": ""}, {"GRAFTQ_DISABLE": "1"}], ids=["by default", "disabled"]
)
def test_off(
    environment: dict[str, str],
    stand_in: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    register()
    assert list(stand_in.methods) == ["awq", "gptq_marlin"]
    assert not HookRegistry.hooks
    assert not caplog.records


def test_an_unknown_choice_is_reported_and_takes_nothing(
    stand_in: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("GRAFTQ_SGLANG", "some")
    register()
    assert "graftq" not in stand_in.methods
    assert "GRAFTQ_SGLANG=some means nothing" in caplog.text


def test_other_platforms_are_left_alone() -> None:
    with installed(platform="npu") as registered:
        register()
        assert "graftq" not in registered.methods


def test_what_sglang_has_moved_is_named_and_recorded(
    stand_in: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from graftq.plugin import failures

    monkeypatch.setitem(sys.modules, "sglang.srt.plugins.hook_registry", None)
    register()
    assert list(stand_in.methods) == ["awq", "gptq_marlin"]
    assert "SGLang 0.5.23 has no sglang.srt.plugins.hook_registry.HookRegistry" in caplog.text
    assert "graftq knows SGLang 0.5.23" in caplog.text
    failures.recorded.pop("taking over SGLang's GPTQ loading")


def test_one_file_imports_from_sglang() -> None:
    adapter = ROOT / "adapters" / "sglang"
    importing = [
        path.name for path in adapter.rglob("*.py") if re.search(r"^\s*(from|import) sglang\b", path.read_text(), re.M)
    ]
    assert importing == ["versions.py"]


def test_import_brings_in_neither_torch_nor_sglang() -> None:
    code = "import sys, graftq.adapters.sglang; print([name for name in ('torch', 'sglang') if name in sys.modules])"
    assert evaluate(code) == ["[]"]


@pytest.mark.parametrize("asked", [None, "gptq", "graftq"])
@pytest.mark.parametrize("raw", [STOCK, *REFUSED, {**STOCK, "checkpoint_format": "gptq_v2"}])
def test_all(stand_in: SimpleNamespace, raw: dict[str, Any], asked: str | None) -> None:
    register()
    assert first_to_take(stand_in.methods, raw, asked) == "graftq"


def test_only_unsupported(stand_in: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFTQ_SGLANG", "unsupported")
    register()
    assert [first_to_take(stand_in.methods, raw) for raw in REFUSED] == ["graftq"] * 3
    assert first_to_take(stand_in.methods, STOCK) == "gptq_marlin"
    assert first_to_take(stand_in.methods, STOCK, "graftq") == "graftq"


def test_only_unsupported_on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFTQ_SGLANG", "unsupported")
    with installed(platform="cpu") as registered:
        register()
        take = registered.methods["graftq"].override_quantization_method
        assert take({**STOCK, "desc_act": False}, None) is None
        assert [take(raw, None) for raw in (STOCK, *REFUSED)] == ["graftq"] * 4


@pytest.mark.parametrize("asked", ["gptq_marlin", "moe_wna16", "awq"])
def test_leaves_what_is_asked_of_others(stand_in: SimpleNamespace, asked: str) -> None:
    register()
    assert stand_in.methods["graftq"].override_quantization_method(STOCK, asked) is None


def test_mixtrals_experts_stay_together(stand_in: SimpleNamespace) -> None:
    register()
    hook, kind = HookRegistry.hooks[f"{UTILS}.get_model_architecture"]
    model = SimpleNamespace(quantization="graftq")
    assert kind == "around"
    assert hook(lambda config: config.quantization, model) == "gptq_marlin"
    assert model.quantization == "graftq"
    assert hook(lambda config: config.quantization, SimpleNamespace(quantization="fp8")) == "fp8"


def test_rocm_lets_our_method_pass() -> None:
    with installed(platform="hip"):
        register()
        hook, _ = HookRegistry.hooks["sglang.srt.configs.model_config.ModelConfig._verify_quantization"]

    def refuse(model: Any) -> None:
        raise ValueError(f"{model.quantization} quantization is currently not supported in ROCm.")

    hook(refuse, SimpleNamespace(quantization="graftq"))
    with pytest.raises(ValueError, match="awq"):
        hook(refuse, SimpleNamespace(quantization="awq"))


def test_damaged_parameters(stand_in: SimpleNamespace) -> None:
    register()
    with pytest.raises(ValueError, match="bits is 5"):
        stand_in.methods["graftq"].from_config({**STOCK, "bits": 5, "hf_config": object()})
