"""A slow fallback is said once, with its reason and its remedy."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from graftq.plugin import manager
from graftq.quant_linear.gpu.availability import judge_triton
from graftq.quant_linear.gpu.devices import device_of
from graftq.quant_linear.selection import Rejected, Request
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


def test_apple(caplog: pytest.LogCaptureFixture) -> None:
    assert manager.choose_kernel(Request(SPEC, "mps", torch.float16)).provider.name == "torch"
    [(level, message)] = messages(caplog)
    assert level == logging.WARNING
    assert "Triton does not compile for Apple's GPUs (mps)" in message
    assert "load the model with device_map='cpu'" in message


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """What torch says of its CUDA devices: their compute capabilities, to be filled in."""
    found: list[tuple[int, int]] = []
    described = lambda device: SimpleNamespace(  # noqa: E731
        major=found[device.index][0], minor=found[device.index][1], multi_processor_count=40
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
    monkeypatch.setattr(torch.cuda, "get_device_properties", described)
    monkeypatch.setattr(torch.version, "hip", None)
    device_of.cache_clear()
    yield found
    device_of.cache_clear()


def test_bfloat16_on_a_t4(caplog: pytest.LogCaptureFixture, cards: list[tuple[int, int]]) -> None:
    cards[:] = [(7, 5)]
    assert manager.choose_kernel(Request(SPEC, "cuda", torch.bfloat16)).provider.name == "torch"
    assert manager.choose_kernel(Request(SPEC, "cuda", torch.float16)).provider.name == "triton"
    [(_, message)] = messages(caplog)
    assert "cuda:0: compute capability 7.5 has no bfloat16 instructions" in message
    assert "Remedy: load the model with dtype=torch.float16." in message


def test_an_old_card_beside_a_new_one(caplog: pytest.LogCaptureFixture, cards: list[tuple[int, int]]) -> None:
    cards[:] = [(8, 6), (6, 1)]
    assert manager.choose_kernel(Request(SPEC, "cuda", torch.float16)).provider.name == "torch"
    [(_, message)] = messages(caplog)
    assert "cuda:1: compute capability 6.1: Triton compiles for 7.0 and newer" in message
    assert "Remedy: hide cuda:1 with CUDA_VISIBLE_DEVICES." in message


@pytest.mark.parametrize(
    ("platform", "device", "package"),
    [("linux", "cuda", "triton"), ("win32", "cuda", "triton-windows"), ("linux", "xpu", "pytorch-triton-xpu")],
)
def test_the_remedy_names_the_package(
    platform: str, device: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("sys.platform", platform)
    verdict = judge_triton(Request(SPEC, device, torch.float16))
    assert verdict == Rejected("triton is not installed", f"install it: pip install {package}")


def test_triton_absent(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    manager.choose_kernel(Request(SPEC, "cuda", torch.float16))
    [(_, message)] = messages(caplog)
    assert "triton is not installed" in message
    assert "pip install triton" in message


def test_float16_on_a_cpu_says_its_accuracy(caplog: pytest.LogCaptureFixture) -> None:
    for dtype in (torch.float16, torch.float16, torch.bfloat16):
        manager.choose_kernel(Request(SPEC, "cpu", dtype))
    [(level, message)] = messages(caplog)
    assert level == logging.INFO
    assert "float16 has bfloat16's accuracy on CPUs" in message
    assert "dtype=torch.float32" in message
