"""One line that tells how far quantizing is."""

from __future__ import annotations

import sys
import time
from typing import Any

WIDTH = 24
"""Letters of the bar."""


class Progress:
    """A bar on a terminal, with what is being done and the time left; says nothing where there is no terminal."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.shows = sys.stderr.isatty()

    def __enter__(self) -> Progress:
        return self

    def step(self, text: str, share: float) -> None:
        """Show what is being done now, after ``share`` of everything, 0 to 1."""
        if self.shows:
            sys.stderr.write(f"\r\x1b[K{bar(text, share, time.monotonic() - self.started)}")
            sys.stderr.flush()

    def __exit__(self, *error: Any) -> None:
        if self.shows:
            sys.stderr.write("\r\x1b[K")


def bar(text: str, share: float, spent: float) -> str:
    """The line after ``spent`` seconds."""
    full = round(WIDTH * share)
    left = f"{spent / share * (1 - share):.0f} s left" if share else "starting"
    return f"[{'#' * full}{'.' * (WIDTH - full)}] {100 * share:3.0f} % {left}: {text}"
