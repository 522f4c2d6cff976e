"""Whatever is broken in graftq or beside it: the framework imports, and one warning says what failed."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.processes import TESTS, run, unpack_wheel, warnings_of, write_distribution

IMPORT = "import torch, transformers, transformers.modeling_utils\nfrom support.seams import state\nprint(state())\n"
HALF_PATCHED = "print('_graftq' in vars(transformers.modeling_utils.load_state_dict))"
PROVIDERS = """
from graftq.plugin.manager import kernel_providers
print(*sorted(provider.name for provider in kernel_providers()))
"""
NOT_PYTHON = "\ndef broken(:\n"
HOOK = "from graftq.plugin.hookspecs import hookimpl\n\n@hookimpl\n"
SEAMS = HOOK + "def graftq_seams(root):\n    "


def import_with_one_warning(installed: Path) -> tuple[str, str]:
    """How much of transformers is taken over after importing it, and the warning."""
    done = run("-c", IMPORT, path=[installed, TESTS])
    (warning,) = warnings_of(done)
    assert "GRAFTQ_DISABLE=1" in warning
    return done.stdout.strip(), warning


@pytest.mark.parametrize(
    ("file", "blamed"),
    [
        ("plugin/switches.py", "graftq could not start: SyntaxError"),
        ("plugin/import_hooks.py", "graftq could not start: SyntaxError"),
        ("plugin/manager.py", "SyntaxError"),
        ("adapters/transformers/__init__.py", "graftq.adapters:graftq.adapters.transformers failed"),
        ("adapters/transformers/patches.py", "taking over transformers."),
        ("adapters/transformers/quantizer.py", "taking over transformers."),
    ],
)
def test_syntax_error(file: str, blamed: str, installed: Path) -> None:
    with (installed / "graftq" / file).open("a") as stream:
        stream.write(NOT_PYTHON)
    state, warning = import_with_one_warning(installed)
    assert state == "none"
    assert blamed in warning


def test_missing_dependency(installed: Path) -> None:
    (installed / "pluggy.py").write_text("raise ModuleNotFoundError(\"No module named 'pluggy'\", name='pluggy')\n")
    state, warning = import_with_one_warning(installed)
    assert state == "none"
    assert "No module named 'pluggy'" in warning


ADAPTERS = {
    "raises at import": ("raise RuntimeError('at import')", "RuntimeError: at import"),
    "raises in its hook": (SEAMS + "raise RuntimeError('in the hook')", "RuntimeError: in the hook"),
    "returns a list": (SEAMS + "return ['transformers.modeling_utils']", "returned list, not a mapping"),
    "returns rubbish": (SEAMS + "return {3: print, 'x': None}", "something else than module names and functions"),
    "raises while patching": (
        "from graftq.plugin.patching import replace_attribute\n"
        "def patch(module):\n"
        "    replace_attribute(module, 'load_state_dict', lambda stock: lambda: None)\n"
        "    raise RuntimeError('while patching')\n" + SEAMS + "return {'transformers.modeling_utils': patch}",
        "RuntimeError: while patching",
    ),
    "wrong signature": (HOOK + "def graftq_seams(root, color): ...", "PluginValidationError"),
}
KERNELS = {
    "raises at import": ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
    "raises in its hook": (HOOK + "def graftq_kernels():\n    raise RuntimeError('no device')", "no device"),
    "returns a number": (HOOK + "def graftq_kernels():\n    return 3", "'int' object is not iterable"),
    "returns strings": (HOOK + "def graftq_kernels():\n    return ['marlin']", "'marlin', not a kernel provider"),
    "raises on iteration": (HOOK + "def graftq_kernels():\n    yield 1 / 0", "ZeroDivisionError"),
}


@pytest.fixture(scope="module")
def among_rogues(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], list[str]]:
    """What a process prints that has all of the above installed, and its warnings."""
    folder = unpack_wheel(wheel, tmp_path_factory.mktemp("installed"))
    groups = {"graftq.adapters": ADAPTERS, "graftq.kernels": KERNELS}
    for group, rogues in groups.items():
        for number, (module, _) in enumerate(rogues.values()):
            name = f"rogue_{group.rpartition('.')[2]}_{number}"
            entry = "transformers" if rogues is ADAPTERS else name
            write_distribution(folder, name, {group: {entry: name}}, {f"{name}.py": module})
    done = run("-c", IMPORT + HALF_PATCHED + PROVIDERS, path=[folder, TESTS])
    return done.stdout.splitlines(), warnings_of(done)


def test_rogues_cost_nobody_else_anything(among_rogues: tuple[list[str], list[str]]) -> None:
    (state, half_patched, providers), warnings = among_rogues
    assert state == "all"
    assert half_patched == "False"
    assert "torch" in providers.split()
    assert len(warnings) == len(ADAPTERS) + len(KERNELS)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_third_party_adapter(kind: str, among_rogues: tuple[list[str], list[str]]) -> None:
    (warning,) = (line for line in among_rogues[1] if ADAPTERS[kind][1] in line)
    assert f"rogue_adapters_{list(ADAPTERS).index(kind)} failed" in warning
    assert "GRAFTQ_DISABLE=1" in warning


@pytest.mark.parametrize("kind", KERNELS)
def test_third_party_kernels(kind: str, among_rogues: tuple[list[str], list[str]]) -> None:
    (warning,) = (line for line in among_rogues[1] if KERNELS[kind][1] in line)
    assert f"rogue_kernels_{list(KERNELS).index(kind)} failed" in warning
    assert "GRAFTQ_DISABLE=1" in warning


def test_switched_off_says_nothing(installed: Path) -> None:
    with (installed / "graftq" / "plugin" / "import_hooks.py").open("a") as stream:
        stream.write(NOT_PYTHON)
    done = run("-c", IMPORT, path=[installed, TESTS], GRAFTQ_DISABLE="1")
    assert done.stdout.split() == ["none"]
    assert not warnings_of(done)
