"""Patches for the length of a test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from graftq.plugin import patching


@contextmanager
def undoing() -> Iterator[None]:
    """At the end, put back what was replaced meanwhile."""
    before = len(patching._undo)
    try:
        yield
    finally:
        patching._put_back(patching._undo, before)
