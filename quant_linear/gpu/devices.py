"""What the launch of a kernel depends on besides its arguments: the device it runs on."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import torch

from graftq.quant_linear.gpu.tile_heuristics import Device
from graftq.quant_linear.kernels.unpack import unpack_program


@lru_cache(maxsize=64)
def device_of(device: torch.device) -> Device:
    """What a tile choice depends on."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        capability = 0 if torch.version.hip else properties.major * 10 + properties.minor
        return Device("hip" if torch.version.hip else "cuda", capability, properties.multi_processor_count)
    return Device(device.type, 0, 64)  # the interpreter, or a device whose tiles nobody has measured


@lru_cache(maxsize=64)
def program_for(device: torch.device, bits: int, dtype: torch.dtype, sym: bool) -> str:
    """The unpacking text for ``device``: inline PTX where there is PTX with the instructions, else ""."""
    if device_of(device).capability < 80:
        return ""
    return unpack_program(bits, "fp16" if dtype == torch.float16 else "bf16", 2 ** (bits - 1) if sym else None)


def row_stride(shape: tuple[int, ...], strides: tuple[int, ...]) -> int | None:
    """Elements from one row of a tensor [..., K] to the next, through all leading dimensions; None if that varies.

    Kernels read activations so; None also if a row is not in one piece.
    """
    if shape[-1] != 1 and strides[-1] != 1:
        return None
    leading = [(size, stride) for size, stride in zip(shape[:-1], strides[:-1], strict=True) if size != 1]
    for (_, outer), (size, inner) in pairwise(leading):
        if outer != size * inner:
            return None
    return leading[-1][1] if leading else shape[-1]
