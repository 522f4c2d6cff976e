"""Compiling needs no GPU: what the interpreter accepts and the compiler does not shows here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_kernels_compile_for_gpus_that_are_not_there(tmp_path: Path):
    pytest.importorskip("triton")
    script = Path(__file__).with_name("compile_for_gpus.py")
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
