"""The kernels run on the GPU there is, or in Triton's interpreter, to be asked for before Triton's import."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU and "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def device() -> str:
    """Where the kernels run: "cuda", or "cpu" for the interpreter."""
    pytest.importorskip("triton")
    if not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("no GPU, and Triton was imported before its interpreter could be asked for (TRITON_INTERPRET=1)")
    return "cuda" if ON_GPU else "cpu"


@pytest.fixture
def gpu() -> str:
    """A GPU, for what the interpreter cannot show."""
    if not ON_GPU:
        pytest.skip("needs a GPU")
    return "cuda"


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fill new memory with NaN, so that whatever is read before it is written shows."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
