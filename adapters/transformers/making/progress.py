"""One line that tells how far quantizing is."""

from __future__ import annotations

import sys
import time
from typing import Any


class Progress:
    """Prints to a terminal; says nothing where there is none."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.shows = sys.stderr.isatty()

    def __enter__(self) -> Progress:
        return self

    def step(self, text: str) -> None:
        """Show what is being done now."""
        if self.shows:
            sys.stderr.write(f"\r\x1b[Kquantizing {text} ({time.monotonic() - self.started:.0f} s)")
            sys.stderr.flush()

    def __exit__(self, *error: Any) -> None:
        if self.shows:
            sys.stderr.write("\r\x1b[K")
