"""The interpreter with a real SGLang that GRAFTQ_TEST_SGLANG names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

VARIABLE = "GRAFTQ_TEST_SGLANG"
STANDIN = Path(__file__).parent / "standin"


@pytest.fixture(scope="session")
def interpreter() -> str:
    python = os.environ.get(VARIABLE)
    if not python:
        pytest.skip(f"{VARIABLE} names no interpreter with SGLang; tests/sglang/environment makes one")
    return str(Path(python).absolute())  # processes are started in other folders


@pytest.fixture(scope="session")
def cpu_engine() -> dict[str, str]:
    """The environment in which SGLang runs on a CPU, with its compiled kernels left out."""
    return {
        "PYTHONPATH": str(STANDIN),
        "SGLANG_USE_CPU_ENGINE": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "SGLANG_NCCL_SO_PATH": "none",  # with it, ranks on CPUs would look for GPUs
        "GRAFTQ_SGLANG": "all",
    }
