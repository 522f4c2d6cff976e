"""The environment variables that graftq obeys."""

from __future__ import annotations

import os

DISABLE = "GRAFTQ_DISABLE"
"""Leave everything as it would be without graftq."""
KERNEL = "GRAFTQ_KERNEL"
"""The name of the kernel to use, whatever others there are."""
AUTO_GPTQ = "GRAFTQ_AUTO_GPTQ"
"""Stand in for AutoGPTQ where that is not installed."""
VLLM = "GRAFTQ_VLLM"
"""Which GPTQ checkpoints to take over in vLLM: "all" (the default), or "unsupported", those that vLLM refuses."""
SGLANG = "GRAFTQ_SGLANG"
"""Which GPTQ checkpoints to take over in SGLang: none (the default), "all", or "unsupported", those it refuses."""

WARM_UP = "GRAFTQ_WARM_UP"
"""In transformers, compile all kernels that calls of so many tokens need when a packed model is loaded."""


def is_on(name: str) -> bool:
    """Whether the variable is set to anything but "" or "0"."""
    return os.environ.get(name, "") not in ("", "0")


def number(name: str) -> int:
    """The variable's number; 0 if it is not set.

    Raises:
        ValueError: if it is no number, naming the variable.
    """
    value = os.environ.get(name, "") or "0"
    if not value.isdecimal():
        raise ValueError(f"{name}={value} is no number")
    return int(value)


def disabled() -> bool:
    """Whether the user has switched graftq off."""
    return is_on(DISABLE)
