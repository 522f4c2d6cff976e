"""Worker processes that judge cases, each within a limit of time."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

LIMIT = 30
"""Seconds for one case; what takes longer hangs."""

Key = tuple[int, str, int]
"""Seed, kind and number of a case."""


class Worker:
    """A process that stays, and is started again when a case has ended it."""

    def __init__(self) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the worker
        self._process: subprocess.Popen[bytes] | None = None

    def judge(self, key: Key) -> dict[str, str]:
        """What ``verdict.judge`` says, or that the case hangs or ends the process."""
        process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(key).encode() + b"\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if line:
            return json.loads(line)
        self._process = None
        status = process.wait()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace")
        hangs = "Timeout (" in said
        where = [text.strip() for text in said.splitlines() if text.strip().startswith("File ")]
        detail = " | ".join(where[:4]) if hangs else said[-600:]
        return {"load": "hangs" if hangs else f"ends the process ({status})", "load_detail": detail}

    def _start(self) -> subprocess.Popen[bytes]:
        self._errors.seek(0)
        self._errors.truncate()
        environment = {
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "TRANSFORMERS_VERBOSITY": "critical",
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
            "PYTHONPATH": str(Path(__file__).parent.parent),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fuzz.pool"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, **environment},
        )
        return self._process

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.communicate()
            self._process = None
        self._errors.close()


class Pool:
    """Some workers, side by side."""

    def __init__(self, size: int):
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        self._workers = [Worker() for _ in range(size)]

    def judge(self, keys: Iterable[Key]) -> Iterator[tuple[Key, dict[str, str]]]:
        """Each case's verdict, as soon as there is one."""
        waiting: queue.SimpleQueue[Key | None] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[Key, dict[str, str]]] = queue.SimpleQueue()
        keys = list(keys)
        for key in keys:
            waiting.put(key)

        def work(worker: Worker) -> None:
            while (key := waiting.get()) is not None:
                done.put((key, worker.judge(key)))

        threads = [threading.Thread(target=work, args=(worker,), daemon=True) for worker in self._workers]
        for thread in threads:
            waiting.put(None)
            thread.start()
        for _ in keys:
            yield done.get()
        for thread in threads:
            thread.join()

    def close(self) -> None:
        """End all processes."""
        for worker in self._workers:
            worker.close()


def _serve() -> None:
    """Answer cases, one a line; what anything else prints does not get between the answers."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import transformers.models.llama.modeling_llama
    import transformers.models.mixtral.modeling_mixtral  # noqa: F401 - what takes long must not count as a case's time

    from fuzz.cases import case
    from fuzz.verdict import judge

    for line in sys.stdin:
        faulthandler.dump_traceback_later(LIMIT, exit=True)
        answer: dict[str, Any]
        try:
            answer = judge(case(*json.loads(line)))
        except Exception:
            answer = {"load": "the test itself fails", "load_detail": traceback.format_exc()[-1500:]}
        faulthandler.cancel_dump_traceback_later()
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
