"""The scripts of ``examples/``, run here: a fresh interpreter would take longer to import than they to run."""

from __future__ import annotations

import contextlib
import io
import runpy
import sys
from unittest import mock

from support.processes import ROOT


def run_example(name: str, *arguments: str) -> str:
    """What ``examples/name`` prints."""
    script = str(ROOT / "examples" / name)
    with mock.patch.object(sys, "argv", [script, *arguments]), contextlib.redirect_stdout(io.StringIO()) as out:
        runpy.run_path(script, run_name="__main__")
    return out.getvalue()
