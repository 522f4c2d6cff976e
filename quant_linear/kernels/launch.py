"""Kernel launches in less host time than Triton's own, which analyzes all thirty arguments at every call."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
import triton
from triton.runtime import driver

Options = tuple[tuple[str, "int | bool"], ...]
"""Launch options such as ``num_warps``."""


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
    of 16, other). The first call looks the variant up; later ones pass it the tensors' addresses without any analysis.
    Calls with a tensor that is not 16-byte aligned go through Triton, which compiles another variant for them.

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
        compiled = self._compiled
        if compiled is None or any_bits & 15:
            ahead = _ahead.get()
            if ahead is not None:
                self._compile(tensors, ahead)
                return
            found = self._kernel[self._grid](*tensors, *self._arguments, **self._options)
            device = tensors[0].device
            if found is not None and device.type == "cuda" and not any_bits & 15:  # the interpreter compiles nothing
                self._device = device.index
                self._head = (found.function, found.packed_metadata, None, None, None)
                self._compiled = found.run
            return
        compiled(*self._grid, driver.active.get_current_stream(self._device), *self._head, *addresses, *self._arguments)

    def variant(self, tensors: tuple[torch.Tensor, ...]) -> Hashable:
        """All that Triton compiles a kernel for, if the tensors are aligned."""
        classes = tuple(1 if value == 1 else 16 * (value % 16 == 0) for value in self._integers)
        dtypes = tuple(tensor.dtype for tensor in tensors)
        return (self._kernel, dtypes, classes, self._constants, tuple(self._options.items()))

    def _compile(self, tensors: tuple[torch.Tensor, ...], kernels: dict[Hashable, Any]) -> None:
        variant = self.variant(tensors)
        if variant not in kernels:
            dtypes = [tensor.dtype for tensor in tensors]
            kernels[variant] = self._kernel.warmup(*dtypes, *self._arguments, grid=self._grid, **self._options)
