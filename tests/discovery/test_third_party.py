"""graftq and a third party's distribution, installed into fresh virtual environments by pip."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from support.processes import ROOT, copy_sources, make_venv, run

PLACES = """
import graftq.plugin, graftq.quant_linear, graftq.adapters.transformers
print(graftq.plugin.__file__)
for name in ("plugin", "adapters", "quant_linear"):
    try:
        __import__(name)
    except ModuleNotFoundError as error:
        print(error)
"""


@pytest.fixture(scope="module")
def third_partys_python(wheel: Path, third_party_wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_venv(tmp_path_factory.mktemp("wheels") / "venv", str(wheel), str(third_party_wheel))


def test_adapter_and_kernels_are_found(third_partys_python: Path) -> None:
    code = """
import torch
import toyframework.engine
from dataclasses import replace
from graftq.plugin.cli import doctor
from graftq.plugin.cli import machine
print(toyframework.engine.load("model"))
for bits in (4, 8):
    spec = replace(doctor.TYPICAL, bits=bits)
    print(machine.kernel(spec, "float32") == "toy", "|", machine.verdicts(spec, "float32")["toy"])
"""
    lines = run("-c", code, python=third_partys_python).stdout.splitlines()
    assert lines == [
        "graftq's stock model",
        "True | accepted",
        "False | refused: the toy kernel knows 4 bits only",
    ]


def test_doctor_names_them(third_partys_python: Path) -> None:
    lines = [
        " ".join(line.split())
        for line in run("-m", "graftq.plugin.cli.main", "doctor", python=third_partys_python).stdout.splitlines()
    ]
    assert "toyframework toyframework.engine" in lines
    assert "toy accepted" in lines


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_packages_and_no_top_level_folders(kind: str, third_partys_python: Path, tmp_path: Path) -> None:
    python, home = third_partys_python, third_partys_python.parents[1]
    if kind == "editable":
        home = copy_sources(tmp_path / "sources")
        python = make_venv(tmp_path / "venv", "-e", str(home))
    first, *errors = run("-c", PLACES, python=python, cwd=tmp_path).stdout.splitlines()
    assert Path(first).is_relative_to(home)
    assert errors == [f"No module named '{name}'" for name in ("plugin", "adapters", "quant_linear")]


def test_the_wheel_holds_every_module(wheel: Path) -> None:
    folders = ("plugin", "quant_linear", "adapters")
    modules = {f"graftq/{path.relative_to(ROOT)}" for folder in folders for path in (ROOT / folder).rglob("*.py")}
    modules ^= {"graftq/plugin/package/__init__.py", "graftq/__init__.py"}  # two folders have names of their own
    modules ^= {"graftq/plugin/package/__main__.py", "graftq/__main__.py"}
    modules ^= {"graftq/plugin/autoload/__init__.py", "_graftq_autoload/__init__.py"}
    with zipfile.ZipFile(wheel) as archive:
        assert sorted(modules - set(archive.namelist())) == []
