"""Launching a kernel for less host time than Triton's own analysis of thirty arguments takes."""

from __future__ import annotations

import torch
import triton
from triton.runtime import driver

Options = tuple[tuple[str, "int | bool"], ...]
"""Launch options such as ``num_warps``."""

_compiled: dict[tuple[object, ...], triton.compiler.CompiledKernel] = {}


def launch(
    kernel: triton.JITFunction,
    grid: tuple[int, int, int],
    tensors: tuple[torch.Tensor, ...],
    numbers: tuple[int, ...],
    constants: tuple[object, ...],
    options: Options,
) -> None:
    """Run ``kernel(*tensors, *numbers, *constants)`` on the current stream.

    Triton compiles one kernel per dtypes, constants, and class of each number (1, a multiple of 16, other). Here one
    look-up finds it again, and addresses go to the driver as numbers. Tensors whose memory is not 16-byte aligned take
    Triton's own path, which compiles for that.

    Args:
        kernel: Takes the tensors, the numbers and the constants, in this order.
        grid: Programs in each dimension.
        tensors: All on one device.
        numbers: Integers from 0 to below 2**31.
        constants: Hashable.
        options: Launch options.
    """
    addresses = [tensor.data_ptr() for tensor in tensors]
    united = 0
    for address in addresses:
        united |= address
    if united & 15:
        kernel[grid](*tensors, *numbers, *constants, **dict(options))
        return
    device = tensors[0].device
    key = (
        id(kernel),  # a module's own, so it outlives the entry; hashing it would cost 4 us
        device,
        tuple([tensor.dtype for tensor in tensors]),
        tuple([2 if number == 1 else number % 16 == 0 for number in numbers]),
        constants,
        options,
    )
    compiled = _compiled.get(key)
    if compiled is None:
        compiled = kernel[grid](*tensors, *numbers, *constants, **dict(options))
        if compiled is not None and device.type == "cuda":  # the interpreter compiles nothing
            _compiled[key] = compiled
        return
    stream = driver.active.get_current_stream(device.index)
    arguments = (*addresses, *numbers, *constants)
    compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments)
