"""Launching a kernel for less host time than Triton's own analysis of thirty arguments takes."""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.runtime import driver

Options = tuple[tuple[str, "int | bool"], ...]
"""Launch options such as ``num_warps``."""


class Launch:
    """A kernel of which all but the tensors is settled; calling it runs it on the current stream.

    Triton compiles one kernel per dtypes, constants, and class of each number (1, a multiple of 16, other). The first
    call finds it; later ones give it the tensors' addresses and nothing else to analyse. Tensors whose memory is not
    16-byte aligned take Triton's own path, which compiles for that.

    Args:
        kernel: Takes the tensors, the numbers and the constants, in this order.
        grid: Programs in each dimension.
        numbers: Integers from 0 to below 2**31.
        constants: The kernel's ``constexpr`` arguments.
        options: Launch options.
    """

    __slots__ = ("_compiled", "_device", "_grid", "_head", "_kernel", "_options", "_settled")

    def __init__(
        self,
        kernel: triton.JITFunction,
        grid: tuple[int, int, int],
        numbers: tuple[int, ...],
        constants: tuple[object, ...],
        options: Options,
    ):
        self._kernel = kernel
        self._grid = grid
        self._settled = (*numbers, *constants)
        self._options = dict(options)
        self._compiled: Any = None
        self._device = 0
        self._head: tuple[object, ...] = ()

    def __call__(self, *tensors: torch.Tensor) -> None:
        """Run with ``tensors``, on one device; at every call the same device and dtypes."""
        addresses = [tensor.data_ptr() for tensor in tensors]
        united = 0
        for address in addresses:
            united |= address
        compiled = self._compiled
        if compiled is None or united & 15:
            found = self._kernel[self._grid](*tensors, *self._settled, **self._options)
            device = tensors[0].device
            if found is not None and device.type == "cuda" and not united & 15:  # the interpreter compiles nothing
                self._device = device.index
                self._head = (found.function, found.packed_metadata, None, None, None)
                self._compiled = found.run
            return
        compiled(*self._grid, driver.active.get_current_stream(self._device), *self._head, *addresses, *self._settled)
