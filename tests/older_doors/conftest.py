"""A Mixtral that AutoGPTQ has quantized, what it is known to say, and ``auto_gptq`` as graftq stands in for it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.models import relative_error
from support.processes import ROOT

Check = Callable[[Any], None]


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    return ROOT / "examples" / "tiny-mixtral-gptq"


@pytest.fixture(scope="session")
def assert_true_logits() -> Check:
    """Compares a model's logits with the truth; in half precision on a looser scale."""
    with np.load(ROOT / "tests" / "data" / "tiny-mixtral-truth.npz") as arrays:
        ids, truth = (torch.from_numpy(arrays[name]) for name in ("ids0", "logits0"))

    def check(model: Any) -> None:
        with torch.no_grad():
            found = model(ids.reshape(1, -1)).logits[0].float()
        assert relative_error(found, truth.reshape(found.shape)) < (1e-5 if model.dtype == torch.float32 else 0.05)

    return check


@pytest.fixture
def auto_gptq_asked_for(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """``import auto_gptq`` in this process, as in one that has GRAFTQ_AUTO_GPTQ=1 in its environment."""
    monkeypatch.setenv("GRAFTQ_AUTO_GPTQ", "1")
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "auto_gptq"]:
        del sys.modules[name]
