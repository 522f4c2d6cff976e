"""What the benchmarks share: replayed timing, the device's ceilings, host time and the first calls of a process."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch

from graftq.quant_linear.gpu import split_counters

COLD_BYTES = 130_000_000
"""More than twice the L2 cache of an H100."""

CallFor = Callable[[int], Callable[[], object]]
"""From a number of tokens to a call on so many."""


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


def forget_graphs() -> None:
    """Make the counters of captured graphs available again; for a program that has destroyed all its graphs.

    It reaches into the module's state, since only a benchmark captures and destroys so many graphs that the block of
    counters would be used up.
    """
    devices = list(split_counters._free)
    split_counters._free.clear()
    split_counters._by_stream.clear()
    for device in devices:
        split_counters.reserve(device)


def calls_for(tokens: int) -> int:
    """How many calls go into one graph."""
    return 64 if tokens <= 64 else max(4, 4096 // tokens)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call, with what it started on the device."""
    synchronize()
    started = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - started


@contextmanager
def sampled_peak(memory: Callable[[], int], interval: float = 0.002) -> Iterator[list[int]]:
    """A list that will hold by how much ``memory()`` grew at most, looked at every ``interval`` seconds."""
    before, peak, done = memory(), [0], threading.Event()

    def sample() -> None:
        while not done.wait(interval):
            peak[0] = max(peak[0], memory() - before)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def report_device() -> float:
    """Print the device and its ceilings; the bytes per second that a reduction over 4 GB reads."""
    data = torch.randint(-9, 9, (2**30,), dtype=torch.int32, device="cuda").view(torch.float32)
    bandwidth = data.nbytes / replayed(lambda _: torch.sum(data), 4) * 1e6
    a, b = (torch.randn(8192, 8192, device="cuda").half() for _ in range(2))
    rate = 2 * 8192**3 / replayed(lambda _: torch.mm(a, b), 4) * 1e6
    print(f"{torch.cuda.get_device_name()}; torch {torch.__version__}, Triton {version('triton')}")
    print(f"read {bandwidth / 1e9:.0f} GB/s; fp16 matmul of 8192 cubed {rate / 1e12:.0f} TFLOP/s")
    return bandwidth


@torch.no_grad()
def report_host_time(what: str, call_for: CallFor, tokens: tuple[int, ...] = (1, 16)) -> None:
    """Print what an eager call costs the host, the device kept busy behind it."""
    for m in tokens:
        call = call_for(m)
        for _ in range(100):
            call()
        synchronize()
        started = time.perf_counter()
        for _ in range(500):
            call()
        taken = time.perf_counter() - started
        synchronize()
        print(f"host time of an eager call, {what}, M={m}: {taken / 500 * 1e6:.1f} us")


def print_first_calls(call_for: CallFor) -> None:
    """Print what a process's first calls take."""
    for m in (1, 16):
        print(f"{m}: {timed(call_for(m)) * 1e3:.0f} ms", end="; ")


def report_first_calls(module: str) -> None:
    """Print the first calls of a new process, once with an empty cache of Triton's and once with a warm one.

    Args:
        module: Its ``small_layer()`` makes the :data:`CallFor`.
    """
    script = f"import harness, {module}; harness.print_first_calls({module}.small_layer())"
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
