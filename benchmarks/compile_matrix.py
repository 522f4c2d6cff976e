"""Compile every launch that graftq would make on GPUs that need not be there, and say what became of it.

    python benchmarks/compile_matrix.py                             # all devices; six hours of a core
    python benchmarks/compile_matrix.py --devices sm_75 gfx1100 --bits 4 --tokens 1 16 --layers dense
    python benchmarks/compile_matrix.py --csv FILE --missing        # what a run that ended early left

Each device is described to graftq as torch would describe it, the tile choosers choose, and Triton compiles what they
chose: one row per kernel, tile and class of integers. A row fails if it does not compile in time, or needs more shared
memory than a program has on the device. The estimate is no measurement: loop instructions at one per cycle and
scheduler, against the bytes of the packed weights at the memory's nominal bandwidth, for one layer of the shape below.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported

from cross_compile import CARDS, LAYERS, Job, compile_job, describe, jobs_for

FIELDS = (
    "device", "layer", "bits", "dtype", "sym", "kernel", "tile", "tokens", "verdict", "shared", "limit", "registers",
    "spilled", "instructions", "loop", "matrix", "widest_load", "issue_us", "read_us", "seconds",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", nargs="+", default=list(CARDS), choices=list(CARDS), metavar="NAME")
    parser.add_argument("--layers", nargs="+", default=list(LAYERS), choices=list(LAYERS))
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 3, 4, 8])
    parser.add_argument("--groups", nargs="+", type=int, default=[128])
    parser.add_argument("--tokens", nargs="+", type=int, help="default: every number up to 4096 that changes a tile")
    parser.add_argument("--dtypes", nargs="+", default=["float16", "bfloat16"])
    parser.add_argument("--symmetric", nargs="+", type=int, default=[1, 0])
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--timeout", type=int, default=60, help="seconds for one kernel")
    parser.add_argument("--csv", type=Path, help="append the rows here")
    parser.add_argument("--missing", action="store_true", help="leave out what the file of --csv has a row for")
    options = parser.parse_args()

    jobs: list[Job] = []
    for device in options.devices:
        for layer in options.layers:
            for bits in options.bits:
                for dtype in options.dtypes:
                    for sym in options.symmetric:
                        for group in options.groups:
                            jobs += jobs_for(device, layer, bits, group, dtype, bool(sym), options.tokens)
    if options.missing:
        known = keys_in(options.csv)
        jobs = [job for job in jobs if key(describe(job)) not in known]
    print(f"{len(jobs)} kernels to compile", file=sys.stderr)
    rows = []
    for row in compiled(jobs, options.processes, options.timeout):
        rows.append(row)
        if options.csv is not None:
            append(options.csv, row)
    print(table(rows))
    return any(row["verdict"] != "compiles" for row in rows)


def compiled(jobs: list[Job], processes: int, timeout: float) -> Iterator[dict[str, object]]:
    """A row for each job; each compiles in a process of its own, since nothing else ends a compiler in time."""
    context = multiprocessing.get_context("fork")
    waiting, running = list(reversed(jobs)), []
    while waiting or running:
        while waiting and len(running) < processes:
            job = waiting.pop()
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_compile, args=(job, sender))
            process.start()
            sender.close()
            running.append((job, process, receiver, time.monotonic() + timeout))
        still = []
        for job, process, receiver, deadline in running:
            if receiver.poll(0.05):
                try:
                    yield receiver.recv()
                except EOFError:
                    yield describe(job) | {"verdict": "the compiler crashed"}
                process.join()
            elif time.monotonic() > deadline:
                process.kill()
                yield describe(job) | {"verdict": f"not within {timeout:.0f} s"}
            else:
                still.append((job, process, receiver, deadline))
        running = still


def _compile(job: Job, sender: Connection) -> None:
    sender.send(compile_job(job))


def key(row: dict[str, object]) -> tuple[str, ...]:
    """What a row is about: its fields before the verdict."""
    return tuple(str(row[field]) for field in FIELDS[: FIELDS.index("verdict")])


def keys_in(path: Path) -> set[tuple[str, ...]]:
    with path.open(newline="", encoding="utf-8") as file:
        return {key(dict(row)) for row in csv.DictReader(file)}


def append(path: Path, row: dict[str, object]) -> None:
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS)
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def table(rows: list[dict[str, object]]) -> str:
    """One line of Markdown for each device and kernel."""
    lines = ["| device | kernel | compiled | most shared memory | of | most registers | most spilled | matrix | |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for device, kernel in sorted({(str(row["device"]), str(row["kernel"])) for row in rows}):
        mine = [row for row in rows if row["device"] == device and row["kernel"] == kernel]
        failed = Counter(str(row["verdict"]) for row in mine if row["verdict"] != "compiles")
        good = [row for row in mine if row["verdict"] == "compiles"]
        most = {name: max((int(str(row[name])) for row in good), default=0)
                for name in ("shared", "limit", "registers", "spilled")}  # fmt: skip
        fewest = min((int(str(row["matrix"])) for row in good), default=0)
        said = "; ".join(f"{count} {why}" for why, count in failed.items())
        lines.append(
            f"| {device} | {kernel} | {len(good)} of {len(mine)} | {most['shared']} | {most['limit']} "
            f"| {most['registers']} | {most['spilled']} | {fewest} or more | {said} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
