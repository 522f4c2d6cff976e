"""graftq as a wheel, built once, and copies of it that a test may break."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.processes import build_wheel, copy_sources, unpack_wheel


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """graftq's wheel."""
    return build_wheel(copy_sources(tmp_path_factory.mktemp("sources")), tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def third_party_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of ``third_party/``."""
    sources = shutil.copytree(Path(__file__).parent / "third_party", tmp_path_factory.mktemp("sources") / "third_party")
    return build_wheel(sources, tmp_path_factory.mktemp("wheel"))


@pytest.fixture
def installed(wheel: Path, tmp_path: Path) -> Path:
    """A folder to put on PYTHONPATH that holds an installed graftq of the test's own."""
    return unpack_wheel(wheel, tmp_path / "installed")
