"""A slow fallback is said once, with its reason and its remedy."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch

from graftq.plugin import manager
from graftq.quant_linear.selection import Request
from graftq.quant_linear.spec import QuantSpec

SPEC = QuantSpec(4, 64, 32, 32, 2, True, True, 1, 64, 32, 64, 0)


@pytest.fixture(autouse=True)
def fresh(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    manager._reported.clear()
    with caplog.at_level(logging.INFO, "graftq"):
        yield
    manager._reported.clear()


def messages(caplog: pytest.LogCaptureFixture) -> list[tuple[int, str]]:
    return [(record.levelno, record.getMessage()) for record in caplog.records]


def test_float32_on_a_gpu(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        assert manager.choose_kernel(Request(SPEC, "cuda", torch.float32)).provider.name == "torch"
    [(level, message)] = messages(caplog)
    assert level == logging.WARNING
    assert "torch.float32 activations" in message
    assert "Remedy: load the model with dtype=torch.float16" in message


def test_another_reason_is_said_too(caplog: pytest.LogCaptureFixture) -> None:
    manager.choose_kernel(Request(SPEC, "cuda", torch.float32))
    manager.choose_kernel(Request(SPEC, "cuda", torch.float16, pinned=True))
    assert [level for level, _ in messages(caplog)] == [logging.WARNING, logging.WARNING]


def test_on_a_cpu_it_is_information(caplog: pytest.LogCaptureFixture) -> None:
    manager.choose_kernel(Request(SPEC, "cpu", torch.float64))
    assert [level for level, _ in messages(caplog)] == [logging.INFO]


def test_asked_for_is_no_fallback(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFTQ_KERNEL", "torch")
    manager.choose_kernel(Request(SPEC, "cuda", torch.float32))
    assert not messages(caplog)


def test_triton_absent(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    manager.choose_kernel(Request(SPEC, "cuda", torch.float16))
    [(_, message)] = messages(caplog)
    assert "triton is not installed" in message
    assert "pip install triton" in message
