"""Every minor version of transformers, and other versions of torch, under the tests of what users do: docs/versions.md.

    .venv/bin/python tests/matrix.py                    # all of it, written; tests/run has made .venv
    .venv/bin/python tests/matrix.py --only 5.18.0      # one version of transformers, printed alone
    .venv/bin/python tests/matrix.py --today            # one between the ends, another each day, as tests/run does

Each row gets a virtual environment that borrows from .venv whatever need not differ (tests/environment).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "docs" / "versions.md"
NEWEST = ROOT / ".venv"
COLUMNS: dict[str, tuple[str, ...]] = {
    "load": ("transformers/test_formats.py::test_layouts", "transformers/test_loading_options.py::test_dtype"),
    "generate": ("transformers/test_real_checkpoint.py::test_logits_and_greedy_tokens",),
    "save": ("transformers/test_saving.py::test_the_base_model_alone",),
    "tensor parallel": ("transformers/test_tensor_parallel.py",),
    "PEFT": (
        "peft/test_lora.py::test_gradients_are_those_of_the_float_model",
        "peft/test_lora.py::test_merging_wants_a_dequantized_model",
    ),
    "compile": ("transformers/test_compile.py::test_one_graph_without_an_eager_call[mixture]",),
}
"""Few tests each, as a row is to cost some minutes; what differs between versions shows in one model as in many."""

TORCH_ENDS = ("2.6.0", "2.14.1")
"""The oldest that graftq supports, and the newest that could be had."""

LISTED = ("torch", "peft", "accelerate")
SWITCH = "TRANSFORMERS_BETWEEN"
"""The environment variable that takes the day's place, to repeat what failed on another."""


@dataclass
class Row:
    """One environment, and what came of the tests in it: by column, the number of each outcome."""

    transformers: str
    torch: str | None = None
    python: Path | None = None
    versions: dict[str, str] = field(default_factory=dict)
    outcomes: dict[str, Counter[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    is_green: bool = False


def supported() -> list[str]:
    """The versions of transformers that tests/environment names, from the oldest to the newest."""
    return _sourced('echo "${TRANSFORMERS[@]}"').split()


def of_today() -> str:
    """One of the versions between the ends, another each day, unless the environment names one."""
    between = supported()[1:-1]
    return os.environ.get(SWITCH) or between[datetime.date.today().toordinal() % len(between)]


def all_rows() -> list[Row]:
    """Every transformers on the torch of .venv; the newest, and for the oldest torch also the oldest, on its ends."""
    known = supported()
    oldest, newest = TORCH_ENDS
    ends = [Row(known[0], oldest), Row(known[-1], oldest), Row(known[-1], newest)]
    return [*map(Row, known), *ends]


def install(row: Row) -> None:
    """Make the environment of ``row``, and note what it has."""
    below, name = NEWEST, f"transformers-{row.transformers}"
    try:
        if row.torch:
            below = _environment(f"torch-{row.torch}", below, f"torch=={row.torch}")
            name += f"-torch-{row.torch}"
        folder = _environment(name, below, f"transformers=={row.transformers}")
    except subprocess.CalledProcessError as error:
        row.notes.append(f"could not be installed: {error.stderr.strip().splitlines()[-1]}")
        return
    row.python = folder / "bin" / "python"
    code = f"import json; from importlib.metadata import version; print(json.dumps([version(n) for n in {LISTED}]))"
    found = subprocess.run([row.python, "-c", code], check=True, capture_output=True, text=True).stdout
    row.versions = dict(zip(LISTED, json.loads(found), strict=True))


def _environment(name: str, below: Path, package: str) -> Path:
    folder = ROOT / ".venv-matrix" / name
    _sourced('environment_over "$@"', str(folder), str(below), package)
    return folder


def _sourced(command: str, *arguments: str) -> str:
    """What a command prints that knows tests/environment."""
    shell = ["bash", "-euc", f". tests/environment; {command}", "bash", *arguments]
    return subprocess.run(shell, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def test(row: Row) -> Row:
    """Run the tests of all columns in the environment of ``row``."""
    if row.python is None:
        return row
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        selected = [f"tests/{test}" for tests in COLUMNS.values() for test in tests]
        options = ["-q", "--tb=short", "-p", "no:cacheprovider", "-o", "junit_family=xunit1", f"--junitxml={report}"]
        ran = subprocess.run(
            [row.python, "-m", "pytest", *options, *selected], cwd=ROOT, capture_output=True, text=True
        )
        row.is_green = ran.returncode == 0
        if not row.is_green:
            print(ran.stdout + ran.stderr, flush=True)
        if report.exists():
            read(row, report)
        else:
            row.notes.append(f"pytest did not run: {(ran.stdout + ran.stderr).strip().splitlines()[-1]}")
    return row


def read(row: Row, report: Path) -> None:
    """Count pytest's outcomes by column; note why a test was skipped, or how it failed."""
    column_of = {f"tests/{test.split('::')[0]}": column for column, tests in COLUMNS.items() for test in tests}
    told: dict[str, list[str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        outcome = "passed"
        for kind, said in (("skipped", "skipped"), ("failure", "failed"), ("error", "failed")):
            element = case.find(kind)
            if element is not None:
                outcome = said
                message = (element.get("message") or "").strip().partition("\n")[0][:200]
                told.setdefault(f"{said}: {message}", []).append(f"`{case.get('name')}`")
        column = column_of[case.get("file", "")]
        row.outcomes.setdefault(column, Counter())[outcome] += 1
    row.notes += [
        f"{reason} ({tests[0] if len(tests) == 1 else f'{len(tests)} tests'})" for reason, tests in told.items()
    ]


def cells(row: Row) -> list[str]:
    """One line of the table."""
    told = []
    for column in COLUMNS:
        counts = row.outcomes.get(column)
        parts = [f"{counts[kind]} {kind}" for kind in ("passed", "failed", "skipped") if counts[kind]] if counts else []
        told.append(f"**{', '.join(parts)}**" if counts and counts["failed"] else ", ".join(parts) or "not run")
    return [row.transformers, row.versions.get("torch", row.torch or ""), *told]


def render(rows: Sequence[Row]) -> str:
    """The page."""
    table = [["transformers", "torch", *COLUMNS], ["---"] * (2 + len(COLUMNS)), *map(cells, rows)]
    newest = next((row.versions for row in rows if row.versions), {})
    beside = ", ".join(f"{name} {newest[name]}" for name in LISTED[1:] if name in newest)
    where = f"Python {platform.python_version()}, {platform.system()} on {platform.machine()}, CPU only"
    columns = [f"| {column} | {', '.join(f'`tests/{test}`' for test in tests)} |" for column, tests in COLUMNS.items()]
    notes = [
        f"- transformers {row.transformers}, torch {row.versions.get('torch', row.torch)}: {note}"
        for row in rows
        for note in row.notes
    ]
    return "\n".join(
        [
            "# Versions",
            "",
            f"Written by `tests/matrix.py` on {datetime.date.today():%d %B %Y} ({where}; {beside}).",
            "A cell counts tests; they compare with the float model, or with the files.",
            "",
            *(f"| {' | '.join(line)} |" for line in table),
            "",
            *(["Failed or skipped:", "", *notes, ""] if notes else []),
            "| column | tests |",
            "| --- | --- |",
            *columns,
            "",
            "`tests/run` runs all tests on the newest transformers, `tests/transformers` on the oldest, and some of",
            f"them on one version between, another each day; `{SWITCH}=5.18.0 tests/run` repeats one. vLLM's",
            "and text-generation-inference's versions are in [vllm.md](vllm.md) and [tgi.md](tgi.md).",
            "",
        ]
    )


def main() -> None:
    """Run the rows that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="VERSION", help="of transformers; the page is left as it is")
    parser.add_argument(
        "--today", action="store_true", help=f"one version between the ends: another each day, or {SWITCH}"
    )
    parser.add_argument("--at-once", type=int, default=1, help="rows that are tested at the same time")
    arguments = parser.parse_args()
    only = [of_today()] if arguments.today else arguments.only
    rows = [row for row in all_rows() if not only or row.transformers in only]
    for row in rows:
        install(row)
    with ThreadPoolExecutor(arguments.at_once) as pool:
        for row in pool.map(test, rows):
            print(*cells(row), *row.notes, sep=" | ", flush=True)
    if not only:
        TABLE.write_text(render(rows), encoding="utf-8")
    sys.exit(not rows or not all(row.is_green for row in rows))


if __name__ == "__main__":
    main()
