"""The examples for AutoGPTQ and optimum; in this process, which has transformers imported."""

from __future__ import annotations

import runpy

import pytest
from support.processes import ROOT

COMPLETED = "def read(path):\n    with open(path) as f:\n"


def output(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("sys.argv", [name])
    runpy.run_path(str(ROOT / "examples" / name))
    return capsys.readouterr().out


@pytest.mark.usefixtures("auto_gptq_asked_for")
def test_auto_gptq(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from graftq.adapters.auto_gptq import stand_in

    monkeypatch.setattr(stand_in._stand_in, "asked", False)  # which it is to be again afterwards
    printed = output("with_auto_gptq.py", capsys, monkeypatch)
    assert printed.startswith(COMPLETED)
    assert "BaseQuantizeConfig(bits=4, group_size=-1" in printed


def test_optimum(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optimum.gptq")
    assert output("with_optimum.py", capsys, monkeypatch).startswith(COMPLETED)
