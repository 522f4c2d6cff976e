"""Which versions of an engine are supported."""

from __future__ import annotations

import re


def is_between(version: str, oldest: tuple[int, ...], newest: tuple[int, ...]) -> bool:
    """Whether a version lies in a range, its ends included; one without numbers ("dev") does not."""
    found = re.match(r"\d+(?:\.\d+)+", version)
    return found is not None and oldest <= tuple(map(int, found[0].split(".")))[: len(oldest)] <= newest
