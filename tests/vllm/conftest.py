"""Engines of a real vLLM, in the interpreter that GRAFTQ_TEST_VLLM names."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.vllm_cases import GROUPS, Case

VARIABLE = "GRAFTQ_TEST_VLLM"
DRIVER = Path(__file__).parent / "run_cases.py"


@pytest.fixture(scope="session")
def interpreter() -> str:
    python = os.environ.get(VARIABLE)
    if not python:
        pytest.skip(f"{VARIABLE} names no interpreter with vLLM; tests/vllm/environment makes one")
    return str(Path(python).absolute())  # processes are started in other folders


@pytest.fixture(scope="session")
def outcome(
    interpreter: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Case], tuple[dict[str, Any], dict[str, Any]]]:
    """From a case to its order and what came of it; one process runs all selected cases of a group, one by one."""
    done: dict[str, dict[str, tuple[dict[str, Any], dict[str, Any]]]] = {}
    selected = [
        item.callspec.params["case"]
        for item in request.session.items
        if hasattr(item, "callspec") and "case" in item.callspec.params
    ]

    def of(case: Case) -> tuple[dict[str, Any], dict[str, Any]]:
        if case.group not in done:
            own = [other for other in selected if other.group == case.group]
            done[case.group] = _run(interpreter, own, case.group, tmp_path_factory.mktemp("vllm"))
        return done[case.group][case.id]

    return of


def _run(python: str, cases: list[Case], group: str, folder: Path) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    orders = []
    for number, case in enumerate(cases):
        place = folder / str(number)
        place.mkdir()
        orders.append(case.order(place))
    written, results = folder / "orders.json", folder / "results.jsonl"
    written.write_text(json.dumps(orders))
    environment = {**os.environ, **GROUPS[group], "VLLM_CACHE_ROOT": str(folder / "cache")}
    command = [python, str(DRIVER), str(written), str(results)]
    done = subprocess.run(
        command, env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines = results.read_text().splitlines() if results.exists() else []
    outcomes = {line["id"]: line for line in map(json.loads, lines)}
    said = f"exit {done.returncode}\n{done.stdout[-20000:]}"
    # An engine in other processes only says that it failed; why, they have printed.
    for line in outcomes.values():
        if "error" in line and "EngineCore" in line["error"]:
            line["error"] += f"\n{said}"
    return {order["id"]: (order, outcomes.get(order["id"], {"error": said})) for order in orders}
