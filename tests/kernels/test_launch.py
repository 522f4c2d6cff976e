"""Launches past Triton's wrapper, and sequences of them on one workspace."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from graftq.quant_linear.kernels import launch as launching
from graftq.quant_linear.kernels.launch import Launch, LaunchSequence, Part, _without_wrapper

HEAD = (1234, (4, 1, 0), None, None, None)
"""Function, metadata, and what Triton's hooks would get."""


class Wrapper:
    """As Triton 3.6 wraps a compiled launcher: with constants, and memory if the kernel wants some."""

    def __init__(self, size: int = 0):
        self.size = size
        self.launched: list[tuple[object, ...]] = []

    def launch(self, *arguments: object) -> None:
        self.launched.append(arguments)

    def __call__(self, x: Any, y: Any, z: Any, stream: object, function: object, *rest: object) -> None:
        scratch = torch.empty(x * y * z * self.size) if self.size else None
        self.launch(x, y, z, stream, function, False, True, scratch, *rest)


class Packing(Wrapper):
    """One that passes the kernel's arguments on in another form."""

    def __call__(self, x: Any, y: Any, z: Any, stream: object, function: object, *rest: object) -> None:
        self.launch(x, y, z, stream, function, rest)


class Making(Wrapper):
    """One that makes an argument at each call."""

    def __call__(self, x: Any, y: Any, z: Any, stream: object, function: object, *rest: object) -> None:
        self.launch(x, y, z, stream, function, object(), *rest)


def test_past_the_wrapper() -> None:
    wrapper = Wrapper()
    run, head = _without_wrapper(wrapper, HEAD)
    assert not wrapper.launched
    for call, arguments in ((wrapper, HEAD), (run, head)):
        call(2, 3, 1, 7, *arguments, 64, 128, 5)
    assert wrapper.launched[0] == wrapper.launched[1]
    assert run == wrapper.launch


@pytest.mark.parametrize(
    "wrapper", [Wrapper(size=16), Packing(), Making(), print], ids=["memory", "packs", "makes", "none"]
)
def test_a_wrapper_that_does_more_is_kept(wrapper: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert _without_wrapper(wrapper, HEAD) == (wrapper, HEAD)


class Kernel:
    """In the place of Triton's: notes the tensors that it gets."""

    def __init__(self) -> None:
        self.tensors: list[tuple[torch.Tensor, ...]] = []

    def __getitem__(self, grid: object) -> Any:
        return lambda *arguments, **options: self.tensors.append(arguments)


@pytest.fixture
def sequence(monkeypatch: pytest.MonkeyPatch) -> tuple[LaunchSequence, Kernel, list[tuple[int, ...]]]:
    """Two launches of a kernel, compiled; what the second call got by tensors, and by addresses."""
    stream = SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda device: 7))
    monkeypatch.setattr(launching, "driver", stream)
    kernel, addresses = Kernel(), []
    first, second = (Launch(kernel, (grid, 1, 1), (), (), ()) for grid in (1, 2))  # type: ignore[arg-type]
    parts = {"small": Part(3, torch.float16), "large": Part(200, torch.float32)}
    steps = [(first, ("x", "small", "large")), (second, ("large", "weight", "x"))]
    launches = LaunchSequence(("x", "absent", "weight"), parts, steps)
    for launch in (first, second):
        launch._compiled = lambda *arguments: addresses.append(arguments)
    launches(torch.zeros(8), None, torch.zeros(8))
    addresses.clear()
    return launches, kernel, addresses


def test_one_workspace(sequence: tuple[LaunchSequence, Kernel, list[tuple[int, ...]]]) -> None:
    launches, kernel, addresses = sequence
    x, weight = torch.zeros(8), torch.zeros(8)
    launches(x, None, weight)
    (*first, x_at, small, large), (*second, again, weight_at, x_again) = addresses
    assert (first, second) == ([1, 1, 1, 7], [2, 1, 1, 7])
    assert (x_at, x_again, weight_at, again) == (x.data_ptr(), x.data_ptr(), weight.data_ptr(), large)
    assert small % 16 == 0
    assert large - small == 256
    assert not kernel.tensors


def test_unaligned_tensors_go_through_triton(sequence: tuple[LaunchSequence, Kernel, list[tuple[int, ...]]]) -> None:
    launches, kernel, addresses = sequence
    x, weight = torch.zeros(8), torch.zeros(9)[1:]
    launches(x, None, weight)
    assert len(addresses) == 1  # the launch that takes aligned ones alone
    ((large, given, _),) = kernel.tensors
    assert given is weight
    assert (large.dtype, large.numel()) == (torch.float32, 200)
