"""The server's path through transformers, which it takes on CPUs and for models without flash attention."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch

from graftq.adapters.tgi.newer_transformers import without_load_in_8bit
from graftq.plugin import import_hooks


def serve_gptq(module: ModuleType, original: Any) -> Any:
    """Wrap ``CausalLM.fallback`` of ``module``: there the transformers adapter handles GPTQ."""
    function = original.__func__

    @functools.wraps(function)
    def fallback(
        cls: type, model_id: str, revision: str | None = None, quantize: str | None = None, **kwargs: Any
    ) -> Any:
        if quantize != "gptq":
            return function(cls, model_id, revision, quantize=quantize, **kwargs)
        if (hook := import_hooks.finder()) is not None:
            hook.announce("text_generation_server")
        with without_load_in_8bit(module):
            model = function(cls, model_id, revision, quantize=None, **kwargs | _dtype(kwargs.get("dtype")))
        model.quantize = quantize
        return model

    return classmethod(fallback)


def _dtype(asked: torch.dtype | None) -> dict[str, torch.dtype | None]:
    """The server sets float16 for GPTQ on every device; its own default on CPUs is float32."""
    accelerated = torch.cuda.is_available() or (hasattr(torch, "xpu") and torch.xpu.is_available())
    return {"dtype": asked if accelerated or asked != torch.float16 else None}
