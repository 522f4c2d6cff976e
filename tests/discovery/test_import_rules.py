"""The three rules on imports, held by looking at the sources and at fresh interpreters."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.processes import ROOT, evaluate, run

HEAVY = ("torch", "transformers", "triton")
POSIX = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "termios"}
POSIX_ONLY = {
    *("os.chown", "os.fchmod", "os.fork", "os.geteuid", "os.getpgid", "os.getuid", "os.killpg", "os.mkfifo"),
    *("os.sched_getaffinity", "os.setsid", "os.statvfs", "os.sysconf", "os.uname", "os.WIFSIGNALED"),
    *("signal.SIGALRM", "signal.SIGKILL", "signal.alarm", "signal.pause"),
}
LIGHT = {"os", "importlib", "logging"}
FOR_KERNELS = {"torch", "triton", "safetensors", "pluggy"}


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imported(tree: ast.AST) -> Iterator[str]:
    """Modules that importing or running anything under ``tree`` imports; not what type checkers alone see."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        yield from imported(node)


def imported_at_once(tree: ast.AST) -> Iterator[str]:
    """Modules that importing alone imports."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            node.body = []  # type: ignore[assignment]
    return imported(tree)


def of(path: Path) -> ast.AST:
    return ast.parse(path.read_text(encoding="utf-8"))


def root(module: str) -> str:
    return module.partition(".")[0]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", sources("quant_linear"), ids=name)
def test_quant_linear_knows_no_framework(path: Path) -> None:
    foreign = {module for module in imported(of(path)) if root(module) not in sys.stdlib_module_names | FOR_KERNELS}
    assert all(module.startswith("graftq.quant_linear.") for module in foreign), foreign


@pytest.mark.parametrize("path", sources("plugin"), ids=name)
def test_plugin_imports_nothing_heavy_at_once(path: Path) -> None:
    assert not {root(module) for module in imported_at_once(of(path))} & {*HEAVY, "huggingface_hub", "safetensors"}


@pytest.mark.parametrize("path", [*sources("plugin"), *sources("quant_linear"), *sources("adapters")], ids=name)
def test_nothing_posix_is_imported_at_once(path: Path) -> None:
    """What Windows lacks would fail there at the import."""
    assert not {root(module) for module in imported_at_once(of(path))} & POSIX


@pytest.mark.parametrize("path", [*sources("plugin"), *sources("quant_linear"), *sources("adapters")], ids=name)
def test_nothing_posix_is_called(path: Path) -> None:
    named = {ast.unparse(node) for node in ast.walk(of(path)) if isinstance(node, ast.Attribute)}
    assert not named & POSIX_ONLY


def test_the_entry_points_module_imports_nothing_at_once() -> None:
    entry = of(ROOT / "plugin" / "autoload" / "__init__.py")
    assert list(imported_at_once(entry)) == []
    assert {root(module) for module in imported(of(ROOT / "plugin" / "autoload" / "__init__.py"))} <= LIGHT


@pytest.mark.parametrize("path", sorted((ROOT / "adapters").glob("*/__init__.py")), ids=name)
def test_adapter_imports_its_framework_lazily(path: Path) -> None:
    foreign = {module for module in imported_at_once(of(path)) if root(module) not in sys.stdlib_module_names}
    assert all(module.startswith("graftq.plugin.") for module in foreign), foreign


@pytest.mark.parametrize("path", [*sources("plugin"), *sources("quant_linear"), *sources("adapters")], ids=name)
def test_adapters_are_reached_by_entry_point_alone(path: Path) -> None:
    """From outside. Adapters may share what lies in ``serving``, which is none."""
    own = ".".join(("graftq", *path.relative_to(ROOT).parts[:2])) + "."
    allowed = (own, "graftq.adapters.serving.") if own.startswith("graftq.adapters.") else (own,)
    wanted = {module for module in imported(of(path)) if module.startswith("graftq.adapters")}
    assert all(module.startswith(allowed) for module in wanted), wanted


@pytest.mark.parametrize("path", sources("adapters/serving"), ids=name)
def test_what_adapters_share_knows_no_framework(path: Path) -> None:
    foreign = {root(module) for module in imported(of(path)) if root(module) not in sys.stdlib_module_names}
    assert foreign <= {"torch", "graftq"}


def test_importing_all_of_plugin_and_every_adapter_is_light() -> None:
    """The same, transitively."""
    folders = [path.relative_to(ROOT).with_suffix("").parts for path in sources("plugin") if path.stem != "__init__"]
    modules = [".".join(("graftq", *parts)) for parts in folders]
    modules += [f"graftq.adapters.{path.parent.name}" for path in (ROOT / "adapters").glob("*/__init__.py")]
    imports = "\n".join(f"import {module}" for module in modules)
    assert evaluate(f"{imports}\nimport sys\nprint([name for name in {HEAVY} if name in sys.modules])") == ["[]"]


@pytest.mark.parametrize("folder", ["plugin", "adapters", "quant_linear"])
@pytest.mark.parametrize("place", ["checkout", "elsewhere"])
def test_folders_are_no_top_level_packages(folder: str, place: str, tmp_path: Path) -> None:
    done = run("-c", f"import {folder}", cwd=ROOT if place == "checkout" else tmp_path, check=False)
    assert done.returncode
    wanted = "import it by that name" if place == "checkout" else "ModuleNotFoundError"
    assert wanted in done.stderr
