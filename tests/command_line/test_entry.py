"""Ways to the command line, and the version."""

from __future__ import annotations

import re
from importlib.metadata import version

import pytest
from support.processes import run

import graftq


@pytest.mark.parametrize("module", ["graftq", "graftq.plugin.cli.main"])
def test_version(module: str) -> None:
    done = run("-m", module, "--version")
    assert done.stdout.strip() == f"graftq {version('graftq')}" == f"graftq {graftq.__version__}"
    assert re.fullmatch(r"graftq \d+\.\d+\.\d+\S*", done.stdout.strip())


def test_a_module_to_run() -> None:
    assert "quantized" in run("-m", "graftq", "inspect", "examples/tiny-mixtral-gptq").stdout
    assert run("-m", "graftq", check=False).returncode == 2


def test_unknown_attributes() -> None:
    with pytest.raises(AttributeError, match="no attribute 'load'"):
        graftq.load  # noqa: B018 - it is looked up, and not there
