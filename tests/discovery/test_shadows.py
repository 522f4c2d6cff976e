"""Whatever else is called graftq, or missing: torch imports, foreign code does not run, one warning says what to do."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from support.processes import TESTS, run, unpack_wheel, warnings_of

IMPORT = "import torch\nprint('torch', torch.ones(1).item())"
TORCH = "torch 1.0"
FOREIGN = "raise SystemExit('foreign code ran')\n"


def shadow_file(folder: Path) -> None:
    (folder / "graftq.py").write_text(FOREIGN)


def shadow_namespace(folder: Path) -> None:
    (folder / "graftq").mkdir()
    (folder / "graftq" / "notes.txt").write_text("")


def shadow_package(folder: Path) -> None:
    (folder / "graftq" / "plugin").mkdir(parents=True)
    (folder / "graftq" / "__init__.py").write_text(FOREIGN)


SHADOWS = {"file": shadow_file, "package": shadow_package}


def imports_torch(code: str, installed: Path, cwd: Path, **environment: str) -> list[str]:
    """graftq's warnings in a program that imports torch, started in ``cwd``; with none, that graftq is at work."""
    done = run("-c", code, path=[installed, TESTS], cwd=cwd, **environment)
    assert TORCH in done.stdout.splitlines()
    return warnings_of(done)


@pytest.mark.parametrize("shadow", SHADOWS.values(), ids=SHADOWS)
def test_in_the_working_directory(shadow: Callable[[Path], None], installed: Path, tmp_path: Path) -> None:
    shadow(tmp_path)
    (warning,) = imports_torch(IMPORT, installed, tmp_path)
    assert f"{tmp_path / 'graftq'}" in warning
    assert f"hides the package graftq, which is installed in {installed}: rename it" in warning
    assert "GRAFTQ_DISABLE=1" in warning


@pytest.mark.parametrize("shadow", SHADOWS.values(), ids=SHADOWS)
def test_disabled_is_silent(shadow: Callable[[Path], None], installed: Path, tmp_path: Path) -> None:
    shadow(tmp_path)
    assert not imports_torch(IMPORT, installed, tmp_path, GRAFTQ_DISABLE="1")


@pytest.mark.parametrize("group", ["vllm.general_plugins", "sglang.srt.plugins"])
def test_an_engines_door_is_guarded_and_says_it_once(group: str, installed: Path, tmp_path: Path) -> None:
    shadow_file(tmp_path)
    code = f"\nfrom importlib.metadata import entry_points\n(entry,) = entry_points(group={group!r})\n"
    assert len(imports_torch(f"{IMPORT}{code}entry.load()()", installed, tmp_path)) == 1


TAKEN = f"{IMPORT}\nfrom graftq.plugin import import_hooks\nassert import_hooks.finder()"


def test_a_folder_that_is_no_package_hides_nothing(installed: Path, tmp_path: Path) -> None:
    shadow_namespace(tmp_path)
    assert not imports_torch(TAKEN, installed, tmp_path)


def test_the_same_folder_hides_an_editable_installation(installed: Path, tmp_path: Path) -> None:
    """Setuptools' finder for those stands behind the one that takes any folder for a package."""
    shadow_namespace(tmp_path)
    packages = shutil.move(installed / "graftq", tmp_path / "checkout" / "graftq")
    code = f"""
import importlib.util, sys
class Finder:
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == "graftq":
            return importlib.util.spec_from_file_location(name, {str(packages / "__init__.py")!r})
sys.meta_path.append(Finder)
"""
    (warning,) = imports_torch(code + IMPORT, installed, tmp_path)
    assert f"{tmp_path / 'graftq'} hides the package graftq" in warning


@pytest.mark.parametrize("kind", ["wheel", "zip without folder entries"])
def test_an_archive_on_the_path(kind: str, wheel: Path, tmp_path: Path) -> None:
    archive = tmp_path / wheel.name
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(archive, "w") as target:
        for entry in source.infolist():
            if kind == "wheel" or not entry.is_dir():
                target.writestr(entry, source.read(entry))
    assert not imports_torch(TAKEN, archive, tmp_path)


def test_metadata_that_outlived_the_package(installed: Path, tmp_path: Path) -> None:
    shutil.rmtree(installed / "graftq")
    without_graftq = "import sys\nsys.meta_path = [f for f in sys.meta_path if 'Editable' not in str(f)]\n"
    (warning,) = imports_torch(without_graftq + IMPORT, installed, tmp_path)
    assert "the package graftq is missing" in warning
    assert "install graftq again" in warning


CUT_OFF = "def autoload(:\n"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("__init__.py", CUT_OFF),
        ("plugin/__init__.py", CUT_OFF),
        ("plugin/bootstrap.py", CUT_OFF),
        ("plugin/bootstrap.py", ""),
        ("plugin/bootstrap.py", FOREIGN),
        ("plugin/import_hooks.py", ""),
    ],
)
def test_truncated(file: str, content: str, installed: Path, tmp_path: Path) -> None:
    (installed / "graftq" / file).write_text(content)
    (warning,) = imports_torch(IMPORT, installed, tmp_path)
    assert "graftq could not start" in warning


def test_a_module_without_a_spec(installed: Path, tmp_path: Path) -> None:
    code = "import sys, types\nsys.modules['graftq'] = types.ModuleType('graftq')\n"
    (warning,) = imports_torch(code + IMPORT, installed, tmp_path)
    assert "imported before it" in warning


@pytest.mark.parametrize("option", ["-I", "-S", "-O", "-OO", "-Werror", "-E", "-s"])
def test_options_of_the_interpreter(option: str, installed: Path) -> None:
    """``-S`` and ``-I`` take the path away with torch on it; graftq's own part is started by hand."""
    code = f"import sys\nsys.path.insert(0, {str(installed)!r})\n"
    code += (
        "from _graftq_autoload import autoload\nautoload()\nimport json.tool\nprint(type(sys.meta_path[0]).__name__)"
    )
    done = run(option, "-c", code)
    assert done.stdout.split() == ["Finder"]
    assert not done.stderr


def test_no_home(installed: Path, tmp_path: Path) -> None:
    home = {name: "" for name in ("HOME", "USERPROFILE") if name in os.environ}
    assert not imports_torch(TAKEN, installed, tmp_path, **home)


def test_two_installations(installed: Path, wheel: Path, tmp_path: Path) -> None:
    other = unpack_wheel(wheel, tmp_path / "other")
    done = run("-c", TAKEN, path=[other, installed])
    assert not warnings_of(done)
