"""Fresh interpreters, and the distributions that they find installed."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
SWITCHES = (
    "GRAFTQ_DISABLE",
    "GRAFTQ_KERNEL",
    "GRAFTQ_AUTO_GPTQ",
    "GRAFTQ_VLLM",
    "GRAFTQ_SGLANG",
    "TORCH_DEVICE_BACKEND_AUTOLOAD",
    "PYTHONPATH",
    "PYTHONSTARTUP",
)


def run(
    *arguments: str,
    path: Sequence[Path] = (),
    python: Path | str = sys.executable,
    cwd: Path | None = None,
    check: bool = True,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Run an interpreter with ``arguments``, ``path`` before its own packages, and graftq's switches unset but for
    those in ``environment``."""
    inherited = {name: value for name, value in os.environ.items() if name not in SWITCHES}
    joined = os.pathsep.join(map(str, path))
    done = subprocess.run(
        [str(python), "-X", "utf8", *arguments],
        env={**inherited, **({"PYTHONPATH": joined} if joined else {}), **environment},
        cwd=cwd,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
    )
    if check and done.returncode:
        raise AssertionError(f"exit {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def run_ranks(script: Path, *arguments: str, size: int = 2) -> str:
    """Run ``script`` in ``size`` processes, as ``torchrun`` would; what the first prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}

    def start(rank: int) -> str:
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
        return run(str(script), *arguments, path=[TESTS], **shared, **place).stdout

    with ThreadPoolExecutor(size) as pool:
        first, *_ = pool.map(start, range(size))
    return first


def evaluate(
    code: str, *, path: Sequence[Path] = (), python: Path | str = sys.executable, **environment: str
) -> list[str]:
    """The lines that ``code`` prints; ``tests/support`` is importable in it."""
    return run("-c", code, path=[*path, TESTS], python=python, **environment).stdout.splitlines()


def warnings_of(done: subprocess.CompletedProcess[str]) -> list[str]:
    """graftq's warnings; there is no logging configuration, so they are plain lines."""
    return [line for line in done.stderr.splitlines() if "graftq" in line.lower()]


def write_distribution(
    folder: Path, name: str, entry_points: Mapping[str, Mapping[str, str]], files: Mapping[str, str]
) -> Path:
    """Lay a distribution out in ``folder`` as an installer would."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [
        line
        for group, entries in entry_points.items()
        for line in (f"[{group}]", *(f"{entry} = {value}" for entry, value in entries.items()))
    ]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    for file, content in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(content)
    return folder


def copy_sources(target: Path) -> Path:
    """A copy of what graftq is built from, so that building leaves nothing in the checkout."""
    for name in ("plugin", "quant_linear", "adapters"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target / name)
    return target


def build_wheel(sources: Path, target: Path) -> Path:
    """Build a wheel from ``sources``, with the setuptools that is installed here."""
    run("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(target), str(sources))
    return next(target.glob("*.whl"))


def unpack_wheel(wheel: Path, target: Path) -> Path:
    """What installing a pure wheel comes to, for use on PYTHONPATH."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def make_venv(folder: Path, *installed: str) -> Path:
    """A fresh virtual environment with the arguments of ``pip install`` given, and this one's packages to borrow.

    All but graftq, that is, however it is installed here.

    Returns:
        Its interpreter.
    """
    venv.create(folder, with_pip=False, symlinks=os.name == "posix")
    inside = {"base": str(folder), "platbase": str(folder)}
    borrowed = folder / "borrowed"
    borrowed.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "graftq" not in entry.name and entry.suffix != ".pth":
            (borrowed / entry.name).symlink_to(entry)
    Path(sysconfig.get_path("purelib", vars=inside), "borrowed.pth").write_text(f"{borrowed}\n")
    python = Path(sysconfig.get_path("scripts", vars=inside), "python")
    options = ["-q", "--no-deps", "--no-build-isolation", "--no-index", "--ignore-installed"]
    run("-m", "pip", "--python", str(python), "install", *options, *installed)
    return python
