"""Where the Triton kernels run, and what Triton does once; for linear layers and experts alike."""

from __future__ import annotations

import importlib.util
from functools import cache
from importlib import import_module
from typing import Any

import torch

from graftq.quant_linear.selection import Accepted, Rejected, Request, Verdict


def judge_triton(request: Request[Any]) -> Verdict:
    """Accept fp16 and bf16 on GPUs, wherever Triton is installed."""
    if request.device not in ("cuda", "xpu"):
        return Rejected(f"no Triton kernels for device type {request.device}")
    if importlib.util.find_spec("triton") is None:
        return Rejected("triton is not installed", "install it: pip install triton")
    if request.dtype not in (torch.float16, torch.bfloat16):
        reason = f"{request.dtype} activations; the kernels compute in float16 and bfloat16"
        return Rejected(reason, "load the model with dtype=torch.float16 or torch.bfloat16")
    return Accepted()


@cache
def start_triton() -> None:
    """Let Triton hash itself (400 MB, which its cache of kernels goes by) while a model loads, not at its first token.

    Nothing happens where a version of Triton keeps the function elsewhere.
    """
    for module in ("triton.runtime.cache", "triton.compiler.compiler"):
        if hasattr(import_module(module), "triton_key"):
            import_module(module).triton_key()
            return
