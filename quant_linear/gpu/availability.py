"""Where the Triton kernels run, and what Triton does once; for linear layers and experts alike."""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from importlib import import_module
from typing import Any

import torch

from graftq.quant_linear.gpu.devices import device_of, present
from graftq.quant_linear.gpu.targets import refusal
from graftq.quant_linear.selection import Accepted, Rejected, Request, Verdict


def judge_triton(request: Request[Any]) -> Verdict:
    """Accept fp16 and bf16 on GPUs, wherever Triton is installed and compiles for all GPUs that this process sees.

    On XPUs the portable path runs, with the tiles of devices of which nothing is known.
    """
    if request.device == "mps":
        return Rejected("Triton does not compile for Apple's GPUs (mps)", "load the model with device_map='cpu'")
    if request.device not in ("cuda", "xpu"):
        return Rejected(f"no Triton kernels for device type {request.device}")
    if importlib.util.find_spec("triton") is None:
        return Rejected("triton is not installed", f"install it: pip install {_package(request.device)}")
    if request.dtype not in (torch.float16, torch.bfloat16):
        reason = f"{request.dtype} activations; the kernels compute in float16 and bfloat16"
        return Rejected(reason, "load the model with dtype=torch.float16 or torch.bfloat16")
    devices = present(request.device)
    for index, device in enumerate(devices):
        found = refusal(device, request.dtype == torch.bfloat16)
        if found is not None:
            reason, remedy = found
            hide = f"hide {request.device}:{index} with CUDA_VISIBLE_DEVICES" if len(devices) > 1 else ""
            return Rejected(f"{request.device}:{index}: {reason}", " or ".join(filter(None, (remedy, hide))))
    return Accepted()


def can_compile(device: torch.device) -> bool:
    """Whether Triton is installed, and compiles float32 kernels for ``device``."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    return refusal(device_of(device), False) is None


def _package(device: str) -> str:
    """Triton's name on this system, for a type of devices."""
    if device == "xpu":
        return "pytorch-triton-xpu"
    return "triton-windows" if sys.platform == "win32" else "triton"


@cache
def start_triton() -> None:
    """Let Triton hash itself (400 MB, which its cache of kernels goes by) while a model loads, not at its first token.

    Nothing happens where a version of Triton keeps the function elsewhere.
    """
    for module in ("triton.runtime.cache", "triton.compiler.compiler"):
        if hasattr(import_module(module), "triton_key"):
            import_module(module).triton_key()
            return
