"""Kernel launches in less host time than Triton's own, which analyzes all thirty arguments at every call."""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.runtime import driver

Options = tuple[tuple[str, "int | bool"], ...]
"""Launch options such as ``num_warps``."""


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

    __slots__ = ("_arguments", "_compiled", "_device", "_grid", "_head", "_kernel", "_options")

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
            found = self._kernel[self._grid](*tensors, *self._arguments, **self._options)
            device = tensors[0].device
            if found is not None and device.type == "cuda" and not any_bits & 15:  # the interpreter compiles nothing
                self._device = device.index
                self._head = (found.function, found.packed_metadata, None, None, None)
                self._compiled = found.run
            return
        compiled(*self._grid, driver.active.get_current_stream(self._device), *self._head, *addresses, *self._arguments)
