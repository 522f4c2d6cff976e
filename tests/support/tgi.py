"""A real text-generation-inference server, started for a test in its own environment, and spoken to as its router does.

``GRAFTQ_TEST_TGI`` names an interpreter that can import ``text_generation_server`` (``tests/tgi/prepare`` makes one).
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.processes import SWITCHES, TESTS

INTERPRETER = os.environ.get("GRAFTQ_TEST_TGI", "")
HERE = TESTS / "tgi"
STARTED = "Server started at"
PATIENCE = 240


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        prefix: Of its shards' sockets.
        shards: Their number.
        log: What the first shard has written.
    """

    prefix: str
    shards: int
    log: Path

    def talk(self, *conversations: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """For each conversation (see ``tests/tgi/talk.py``) the answers by request id."""
        done = subprocess.run(
            [INTERPRETER, str(HERE / "talk.py"), self.prefix, str(self.shards)],
            input=json.dumps(conversations),
            env={**os.environ, "GRAFTQ_DISABLE": "1"},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert done.returncode == 0, f"{done.stderr}\n{self.log.read_text()}"
        return json.loads(done.stdout)["conversations"]

    def tokens(self, *conversations: list[dict[str, Any]]) -> list[dict[str, list[int]]]:
        """The tokens alone."""
        return [{key: one["tokens"] for key, one in answers.items()} for answers in self.talk(*conversations)]


class ServerFailed(AssertionError):
    """The server ended instead of starting; its log is the message."""


@contextmanager
def serve(
    model: Path, *arguments: str, installed: Path, flash: bool = False, shards: int = 1, **environment: str
) -> Iterator[Server]:
    """Start a server with graftq on its path, until the block is left.

    Args:
        model: The checkpoint.
        arguments: Of ``text-generation-server serve``.
        installed: Where graftq is unpacked.
        flash: Whether the server is to believe that it can run its flash path.
        shards: Processes, each with a share of the model.
        environment: Further variables.

    Raises:
        ServerFailed: if a shard ends.
    """
    path = [str(installed), *([str(HERE / "standin")] if flash else [])]
    inherited = {name: value for name, value in os.environ.items() if name not in SWITCHES}
    common = {
        "PYTHONPATH": os.pathsep.join(path),
        "ATTENTION": "paged",
        "PREFIX_CACHING": "0",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(shards),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }
    with tempfile.TemporaryDirectory(prefix="tgi") as folder:  # sockets' names must be short
        prefix = f"{folder}/s"
        logs = [Path(folder, f"{rank}.log") for rank in range(shards)]
        sharded = ["--sharded"] if shards > 1 else []
        command = [INTERPRETER, str(HERE / "serve.py"), "serve", str(model), *arguments, *sharded, "--uds-path", prefix]
        running = []
        try:
            for rank, log in enumerate(logs):
                variables = {**inherited, **common, "RANK": str(rank), **environment}
                with log.open("w") as output:
                    running.append(
                        subprocess.Popen(command, env=variables, stdout=output, stderr=subprocess.STDOUT, cwd=folder)
                    )
            _wait(running, logs)
            yield Server(prefix, shards, logs[0])
        finally:
            for process in running:
                process.kill()
                process.wait()


def _wait(running: Sequence[subprocess.Popen[bytes]], logs: Sequence[Path]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not all(STARTED in log.read_text() for log in logs):
        ended = any(process.poll() is not None for process in running)
        if ended or time.monotonic() > deadline:
            raise ServerFailed("\n".join(log.read_text() for log in logs))
        time.sleep(0.2)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def ask(number: int, prompt: str, tokens: int = 12, **parameters: Any) -> dict[str, Any]:
    """A request; ``parameters`` as the protocol names them."""
    return {"id": number, "prompt": prompt, "max_new_tokens": tokens, "ignore_eos": True, "parameters": parameters}
