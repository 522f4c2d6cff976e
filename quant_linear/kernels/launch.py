"""Kernel launches in less host time than Triton's own, which analyzes all thirty arguments at every call."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import triton
from triton.runtime import driver

Options = tuple[tuple[str, "int | bool"], ...]
"""Launch options such as ``num_warps``."""

VARIABLE = ("M", "S", "tiles", "tiles_m", "sweep")
"""Integers that follow the number of tokens. No kernel is compiled for a class of them: three instructions of a loop of
176 are all that it would save, in tiles of 16 tokens alone, and a Mixtral would need 133 kernels where it needs 49."""


_ahead: ContextVar[dict[Hashable, Any] | None] = ContextVar("graftq_compiles_ahead", default=None)
"""What has been compiled so far, in a context that compiles and does not run."""


@contextmanager
def compiling_ahead(executor: Executor) -> Iterator[dict[Hashable, Any]]:
    """Have first launches in this context compile their kernel, all of them in parallel, and not run it.

    At the end all are compiled and loaded onto the current device.

    Yields:
        Triton's kernels, or its promises of them, by :meth:`Launch.variant`.
    """
    kernels: dict[Hashable, Any] = {}
    token = _ahead.set(kernels)
    in_parallel = getattr(triton, "AsyncCompileMode", None)  # from Triton 3.4 on
    try:
        with nullcontext() if in_parallel is None else in_parallel(executor):
            yield kernels
    finally:
        _ahead.reset(token)
    for kernel in kernels.values():
        _ = (kernel.result() if hasattr(kernel, "result") else kernel).run  # loads it, which a capture may forbid


class Launch:
    """A kernel with all its arguments but the tensors; calling it runs it on the current stream.

    Triton compiles a variant of the kernel for the dtypes, the constants, and the class of each integer (1, a multiple
    of 16, other) that is not :data:`VARIABLE`. The first call looks the variant up; later ones pass it the tensors'
    addresses without any analysis. Calls with a tensor that is not 16-byte aligned go through Triton, which compiles
    another variant for them.

    Args:
        kernel: Takes the tensors, the integers and the constants, in this order.
        grid: Programs in each dimension.
        integers: From 0 to below 2**31.
        constants: The kernel's ``constexpr`` arguments.
        options: Launch options.
    """

    __slots__ = (
        "_arguments",
        "_compiled",
        "_constants",
        "_device",
        "_grid",
        "_head",
        "_integers",
        "_kernel",
        "_options",
    )

    def __init__(
        self,
        kernel: triton.JITFunction,
        grid: tuple[int, int, int],
        integers: tuple[int, ...],
        constants: tuple[object, ...],
        options: Options,
    ):
        self._kernel = kernel
        self._grid = grid
        self._integers = integers
        self._constants = constants
        self._arguments = (*integers, *constants)
        self._options = dict(options)
        self._compiled: Any = None
        self._device = 0
        self._head: tuple[object, ...] = ()

    def __call__(self, *tensors: torch.Tensor) -> None:
        """Run with ``tensors``, all on one device; every call must have the same device and dtypes."""
        addresses = [tensor.data_ptr() for tensor in tensors]
        any_bits = 0
        for address in addresses:
            any_bits |= address
        if self._compiled is not None and not any_bits & 15:
            stream = driver.active.get_current_stream(self._device)
            self._compiled(*self._grid, stream, *self._head, *addresses, *self._arguments)
            return
        ahead = _ahead.get()
        if ahead is not None:
            self._compile(tensors, ahead)
            return
        found = self._kernel[self._grid](*tensors, *self._arguments, **self._options)
        device = tensors[0].device
        if found is not None and device.type == "cuda" and not any_bits & 15:  # the interpreter compiles nothing
            self._device = device.index
            head = (found.function, found.packed_metadata, None, None, None)
            self._compiled, self._head = _without_wrapper(found.run, head)

    def variant(self, tensors: tuple[torch.Tensor, ...]) -> Hashable:
        """All that Triton compiles a kernel for, if the tensors are aligned."""
        classes = tuple(map(class_of, self._kernel.arg_names[len(tensors) :], self._integers))
        dtypes = tuple(tensor.dtype for tensor in tensors)
        return (self._kernel, dtypes, classes, self._constants, tuple(self._options.items()))

    def _compile(self, tensors: tuple[torch.Tensor, ...], kernels: dict[Hashable, Any]) -> None:
        variant = self.variant(tensors)
        if variant not in kernels:
            dtypes = [tensor.dtype for tensor in tensors]
            kernels[variant] = self._kernel.warmup(*dtypes, *self._arguments, grid=self._grid, **self._options)


def class_of(name: str, value: int) -> int:
    """What of an integer argument a kernel is compiled for."""
    if name in VARIABLE:
        return 0
    return 1 if value == 1 else 16 * (value % 16 == 0)


class Part(NamedTuple):
    """Elements of a workspace, contiguous and aligned."""

    elements: int
    dtype: torch.dtype


Step = tuple[Launch, tuple[str, ...]]
"""A launch and the names of its operands."""


class LaunchSequence:
    """Launches one after the other, on a call's tensors and on parts of a workspace that the call allocates.

    An allocation costs the host as much as a launch, so there is one for all parts; and each tensor's address is asked
    for once, however many launches take it.

    Args:
        tensors: Names of a call's tensors, in its order.
        parts: The workspace's parts, by name.
        steps: The launches, in order.
    """

    __slots__ = ("_bytes", "_compiled", "_device", "_parts", "_steps")

    def __init__(self, tensors: Sequence[str], parts: Mapping[str, Part], steps: Sequence[Step]):
        places = {name: place for place, name in enumerate((*tensors, *parts))}
        self._steps = [(launch, itemgetter(*(places[name] for name in operands))) for launch, operands in steps]
        self._parts: list[tuple[int, int, torch.dtype]] = []
        self._bytes = 0
        for elements, dtype in parts.values():
            end = self._bytes + elements * dtype.itemsize
            self._parts.append((self._bytes, end, dtype))
            self._bytes = -(-end // _ALIGNMENT) * _ALIGNMENT
        self._compiled: list[tuple[Any, ...]] = []
        self._device = 0

    def __call__(self, *tensors: torch.Tensor | None) -> None:
        """Run with ``tensors``, all on one device; None for those that no launch takes.

        Every call must have the same device and dtypes.
        """
        first = tensors[0]
        assert first is not None
        space = first.new_empty(self._bytes, dtype=torch.uint8) if self._bytes else None
        if self._compiled:
            addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
            any_bits = 0
            for address in addresses:
                any_bits |= address
            if not any_bits & 15:
                if space is not None:
                    base = space.data_ptr()
                    addresses += [base + start for start, _, _ in self._parts]
                stream = driver.active.get_current_stream(self._device)
                for run, grid, head, operands, arguments in self._compiled:
                    run(*grid, stream, *head, *operands(addresses), *arguments)
                return
        parts = [] if space is None else [space[start:end].view(dtype) for start, end, dtype in self._parts]
        operands_of: list[Any] = [*tensors, *parts]
        for launch, operands in self._steps:
            launch(*operands(operands_of))
        if all(launch._compiled is not None for launch, _ in self._steps):
            self._device = self._steps[0][0]._device
            self._compiled = [
                (launch._compiled, launch._grid, launch._head, operands, launch._arguments)
                for launch, operands in self._steps
            ]


def _without_wrapper(launcher: Any, head: tuple[object, ...]) -> tuple[Any, tuple[object, ...]]:
    """Triton's compiled launcher, and all that it takes between the stream and the kernel's own arguments.

    Triton wraps it in Python, which adds constants and, for kernels that want it, memory that it allocates. The wrapper
    costs as much as the launch, so it is asked once, with a launcher in place that only notes what it gets.

    Args:
        launcher: What Triton's kernels have as ``run``.
        head: What the wrapper takes between the stream and the kernel's own arguments.

    Returns:
        The arguments, unless the wrapper does more than to add constants.
    """
    taken: list[object] = []
    grid_and_stream, last = (object(), object(), object(), object()), object()
    try:
        probe = copy.copy(launcher)
        direct, probe.launch = launcher.launch, lambda *arguments: taken.extend(arguments)
        probe(*grid_and_stream, *head, last)
    except Exception:  # another Triton's, or it needs a real grid for the size of its memory
        return launcher, head
    *before, end = taken or [None]
    is_plain = tuple(before[:4]) == grid_and_stream and end is last
    added = tuple(before[4:])
    known = (None, False, True, *head)
    if not is_plain or not all(any(value is each for each in known) for value in added):
        return launcher, head
    return direct, added


_ALIGNMENT = 256
"""Bytes; kernels are compiled for 16, and a line of a GPU's cache has 128."""
