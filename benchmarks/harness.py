"""What the benchmarks share: replayed timing, the device's ceilings, recorded peers and tables of rows."""

from __future__ import annotations

import csv
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

COLD_BYTES = 130_000_000
"""More than twice the L2 cache of an H100."""


def replayed(call: Callable[[int], object], calls: int) -> float:
    """Median microseconds of ``call(i)``, i < ``calls``, in one CUDA graph, warm; without a GPU, of one plain call."""
    call(0)
    if not torch.cuda.is_available():
        started = time.perf_counter()
        call(calls - 1)
        return (time.perf_counter() - started) * 1e6
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i)
    started = time.perf_counter()
    while time.perf_counter() - started < 0.03:
        graph.replay()
        torch.cuda.synchronize()
    times = []
    for _ in range(15):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / calls)
    return statistics.median(times)


def read_bandwidth() -> float:
    """Bytes per second of a reduction over 4 GB."""
    data = torch.randint(-9, 9, (2**30,), dtype=torch.int32, device="cuda").view(torch.float32)
    return data.nbytes / replayed(lambda _: torch.sum(data), 4) * 1e6


def matmul_rate() -> float:
    """FLOP per second of torch's fp16 matmul of 8192 cubed."""
    a, b = (torch.randn(8192, 8192, device="cuda").half() for _ in range(2))
    return 2 * 8192**3 / replayed(lambda _: torch.mm(a, b), 4) * 1e6


def host_microseconds(call: Callable[[], object]) -> float:
    """Host time of an eager call, the device kept busy behind it."""

    def wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    for _ in range(100):
        call()
    wait()
    started = time.perf_counter()
    for _ in range(500):
        call()
    taken = time.perf_counter() - started
    wait()
    return taken / 500 * 1e6


def recorded(name: str) -> Iterator[dict[str, str]]:
    """The rows of a file of recorded figures beside this one; lines that begin with # say where they come from."""
    lines = Path(__file__).with_name(name).read_text(encoding="utf-8").splitlines()
    return csv.DictReader(line for line in lines if not line.startswith("#"))


def write_csv(rows: Sequence[Any], path: str) -> None:
    """Dataclass instances as a table with their fields for names."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def report_first_calls(script: str) -> None:
    """Print what ``script`` prints in a new process, once with an empty cache of Triton's and once with a warm one."""
    with tempfile.TemporaryDirectory() as cache:
        for state in ("cold", "warm"):
            said = subprocess.run(
                [sys.executable, "-c", script],
                cwd=Path(__file__).parent,
                env=os.environ | {"TRITON_CACHE_DIR": cache},
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            print(f"first call by tokens, {state} Triton cache:", said.strip("; "))
