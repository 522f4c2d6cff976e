"""Operators are called past the dispatcher only where nobody looks at operators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from graftq.quant_linear.gpu.dispatch_bypass import is_unwatched


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Own(torch.Tensor):
    pass


@contextmanager
def profiling() -> Iterator[None]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        yield


@pytest.mark.parametrize(
    "context", [nullcontext, torch.no_grad, torch.inference_mode], ids=["plain", "no_grad", "inference_mode"]
)
def test_plain_calls(context: Any):
    with context():
        assert is_unwatched(torch.zeros(1))


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")  # torch 2.11's own
@pytest.mark.parametrize("context", [Watching, profiling], ids=["dispatch mode", "profiler"])
def test_watched_calls(context: Any):
    with context():
        assert not is_unwatched(torch.zeros(1))


def test_tensors_of_a_class_of_their_own():
    assert not is_unwatched(torch.zeros(1).as_subclass(Own))


def test_transformed_functions():
    found = []
    torch.func.vmap(lambda x: found.append(is_unwatched(x)) or x)(torch.zeros(2, 1))
    assert found == [False]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_traced_functions():
    found = []
    torch.jit.trace(lambda x: found.append(is_unwatched(x)) or x + 1, torch.zeros(1), check_trace=False)
    assert found == [False]


def test_compiled_functions():
    compiled = torch.compile(lambda x: x + (1 if is_unwatched(x) else 2), backend="eager", fullgraph=True)
    assert compiled(torch.zeros(1)).item() == 2
