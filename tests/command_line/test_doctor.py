"""``graftq doctor``: what is there, what is taken over, which kernels run, and what failed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from support.processes import run, write_distribution

from graftq.plugin.cli import machine
from graftq.quant_linear.gpu.devices import device_of


def doctor(*path: Path, **environment: str) -> tuple[int, list[str]]:
    """Exit status, and the lines with single spaces."""
    done = run("-m", "graftq.plugin.cli.main", "doctor", path=path, check=False, **environment)
    return done.returncode, [" ".join(line.split()) for line in done.stdout.splitlines()]


def test_all_is_well() -> None:
    status, lines = doctor()
    assert status == 0
    (taken,) = [line for line in lines if line.startswith("transformers transformers.")]
    assert "transformers.modeling_utils, transformers.quantizers.auto" in taken
    assert "torch accepted" in lines
    assert lines[-2:] == ["Failures", "none"]
    assert lines[lines.index("Switches") + 1 : lines.index("Taken over")] == [
        "GRAFTQ_DISABLE not set",
        "GRAFTQ_KERNEL not set",
        "GRAFTQ_AUTO_GPTQ not set",
        "GRAFTQ_VLLM not set",
        "GRAFTQ_SGLANG not set",
        "TORCH_DEVICE_BACKEND_AUTOLOAD not set",
    ]


@pytest.mark.parametrize(
    ("switch", "value", "said"),
    [
        ("GRAFTQ_DISABLE", "1", "transformers nothing: GRAFTQ_DISABLE is set"),
        ("TORCH_DEVICE_BACKEND_AUTOLOAD", "0", "transformers nothing: torch did not call graftq"),
    ],
)
def test_switched_off(switch: str, value: str, said: str) -> None:
    status, lines = doctor(**{switch: value})
    assert status == 0
    assert f"{switch} {value}" in lines
    assert any(line.startswith(said) for line in lines)


def test_a_forced_kernel_that_does_not_exist() -> None:
    _, lines = doctor(GRAFTQ_KERNEL="marlin", GRAFTQ_DISABLE="1")
    assert "GRAFTQ_KERNEL marlin" in lines
    assert any(": none: GRAFTQ_KERNEL=marlin: no such kernel; there are" in line for line in lines)


def test_failures_are_listed(tmp_path: Path) -> None:
    write_distribution(
        tmp_path,
        "rogue",
        {"graftq.adapters": {"rogueframework": "rogue"}, "graftq.kernels": {"rogue": "rogue"}},
        {"rogue.py": "raise RuntimeError('not today')", "rogueframework.py": ""},
    )
    status, lines = doctor(tmp_path)
    assert status == 1
    assert "graftq.adapters:rogue: RuntimeError: not today" in lines
    assert "graftq.kernels:rogue: RuntimeError: not today" in lines
    assert "rogueframework nothing" in lines


def test_a_gpu_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    described = SimpleNamespace(name="Tesla T4", major=7, minor=5, multi_processor_count=40)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: described)
    monkeypatch.setattr("torch.version.hip", None)
    device_of.cache_clear()
    (line,) = machine.gpus()
    device_of.cache_clear()
    assert line.startswith("Tesla T4 (sm_75): 64 KB of shared memory, matrix instructions: none; ")
    assert line.endswith("compiled for this architecture, and never run on it")
