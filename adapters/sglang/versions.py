"""Which versions of SGLang are supported."""

from __future__ import annotations

from graftq.adapters.serving.versions import is_between

ONLY = (0, 5, 23)
RANGE = ".".join(map(str, ONLY))


def installed() -> str:
    """The version, whichever distribution it came in."""
    import sglang

    return str(sglang.__version__)


def known(version: str) -> bool:
    """Whether graftq supports this version."""
    return is_between(version, ONLY, ONLY)
