"""A quantized Mixtral and Llama to load, made once; tests that damage one work on a copy."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.checkpoints import write_pair
from support.gptq import Recipe
from support.models import tiny


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``gptq`` folders by architecture; ``float`` twins lie beside them."""
    return {
        name: write_pair(tmp_path_factory.mktemp(name), tiny(name), Recipe(zero_bias=True))
        for name in ("llama", "mixtral")
    }


@pytest.fixture
def copy(originals: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """Copy a checkpoint and its twin to where a test may change them."""

    def make(name: str) -> Path:
        shutil.copytree(originals[name].parent, tmp_path / name)
        return tmp_path / name / "gptq"

    return make
