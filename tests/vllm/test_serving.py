"""What users start: the server that ``vllm serve`` runs, asked over HTTP, and the offline example."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.processes import ROOT, run
from support.vllm_cases import COMMON, GROUPS

CHECKPOINT = ROOT / "examples" / "tiny-mixtral-gptq"
TRUTH = ROOT / "tests" / "data" / "tiny-mixtral-truth.npz"
PATIENCE = 240


@pytest.fixture
def address(interpreter: str, tmp_path: Path) -> Iterator[str]:
    """Of a server for the project's own checkpoint, started without a word about quantization."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # Not the command itself, which looks for a distribution "vllm", and the build for CPUs is called otherwise.
    command = [interpreter, "-m", "vllm.entrypoints.openai.api_server", "--model", str(CHECKPOINT), "--port", port]
    command += ["--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--max-model-len", "128"]
    environment = {**os.environ, **GROUPS["multiprocess"]}
    log = tmp_path / "log"
    with log.open("w") as output:
        server = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=output, stderr=subprocess.STDOUT)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(server, f"{url}/health", log)
        yield url
    finally:
        server.terminate()
        server.wait()


def _wait(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            urllib.request.urlopen(url).close()
            return
        except (urllib.error.URLError, ConnectionError) as error:
            if server.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(log.read_text()) from error
        time.sleep(0.5)


def _ask(url: str, **body: Any) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def test_serve(address: str) -> None:
    with np.load(TRUTH) as truth:
        for number in (0, 1):
            answer = _ask(
                f"{address}/v1/completions",
                model=str(CHECKPOINT),
                prompt=truth[f"ids{number}"].flatten().tolist(),
                max_tokens=16,
                temperature=0,
                ignore_eos=True,
                return_token_ids=True,
            )
            assert answer["choices"][0]["token_ids"] == truth[f"greedy{number}"].flatten()[-32:-16].tolist()


def test_offline_example(interpreter: str) -> None:
    done = run(str(ROOT / "examples" / "vllm_offline.py"), python=interpreter, **COMMON)
    assert "def main(args):\n    " in done.stdout
    assert done.stdout.count("-" * 40) == 2
