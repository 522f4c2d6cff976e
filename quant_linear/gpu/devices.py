"""What launches need to know of the device, and of the strides of their activations."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from itertools import pairwise

import torch

from graftq.quant_linear.gpu.targets import Device


@lru_cache(maxsize=64)
def device_of(device: torch.device) -> Device:
    """The properties of ``device`` that the choice of a tile depends on."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        shared = getattr(properties, "shared_memory_per_block_optin", 0)
        if torch.version.hip:
            arch = properties.gcnArchName.partition(":")[0]  # "gfx942:sramecc+:xnack-"
            return Device("hip", 0, properties.multi_processor_count, arch, shared)
        capability = properties.major * 10 + properties.minor
        return Device("cuda", capability, properties.multi_processor_count, shared=shared)
    return Device(device.type, 0, 64)  # the interpreter, or a device for which tiles were never measured


def present(kind: str) -> list[Device]:
    """The devices of a type such as "cuda" that this process sees; none where torch cannot say."""
    if kind != "cuda" or not torch.cuda.is_available():
        return []
    return [device_of(torch.device(kind, index)) for index in range(torch.cuda.device_count())]


def current(device: torch.device) -> AbstractContextManager[object]:
    """Make ``device`` the one that Triton compiles for and launches on."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


@lru_cache(maxsize=64)
def program_for(device: torch.device, bits: int, dtype: torch.dtype, sym: bool) -> str:
    """``unpack_program``'s text for NVIDIA GPUs from sm_80 on; elsewhere "", the portable path."""
    if device_of(device).capability < 80:
        return ""
    from graftq.quant_linear.kernels.unpack import unpack_program  # not at the top, where triton may be absent

    return unpack_program(bits, "fp16" if dtype == torch.float16 else "bf16", 2 ** (bits - 1) if sym else None)


def row_stride(shape: tuple[int, ...], strides: tuple[int, ...]) -> int | None:
    """Elements from one row of a tensor [..., K] to the next, if they are the same across all leading dimensions.

    None if it varies, or if a row is not contiguous.
    """
    if shape[-1] != 1 and strides[-1] != 1:
        return None
    leading = [(size, stride) for size, stride in zip(shape[:-1], strides[:-1], strict=True) if size != 1]
    for (_, outer), (size, inner) in pairwise(leading):
        if outer != size * inner:
            return None
    return leading[-1][1] if leading else shape[-1]
