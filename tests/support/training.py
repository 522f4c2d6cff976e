"""Where adapters are trained, and on what."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer

from support.processes import ROOT

REAL = ROOT / "examples" / "tiny-mixtral-gptq"
"""A Mixtral that AutoGPTQ has quantized."""

_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
PLACES = pytest.mark.parametrize(
    ("device", "dtype"),
    [
        pytest.param("cpu", torch.float32, id="cpu-float32"),
        pytest.param("cpu", torch.bfloat16, id="cpu-bfloat16"),
        pytest.param("cuda", torch.float16, id="cuda-float16", marks=_GPU),
        pytest.param("cuda", torch.bfloat16, id="cuda-bfloat16", marks=_GPU),
    ],
)


def rows_of_text(count: int, length: int) -> torch.Tensor:
    """Tokens [count, length] of Python code, as the Mixtral knows it."""
    code = (ROOT / "plugin" / "import_hooks.py").read_text(encoding="utf-8")
    tokenize = AutoTokenizer.from_pretrained(REAL)
    return tokenize(code, truncation=True, max_length=count * length, return_tensors="pt").input_ids.view(count, length)
