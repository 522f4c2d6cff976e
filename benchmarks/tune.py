"""Try other tiles than the two ``tile_heuristics`` choose, where targets are missed; a person enters the better ones.

    python benchmarks/tune.py [--dense] [--experts] [--out tune.csv]     # neither: both
    TRITON_INTERPRET=1 python benchmarks/tune.py --check                 # tiny, anywhere: does it all run?

First several processes compile what will be tried, each kernel once for all shapes that share it, into Triton's cache.
Then one process times each candidate, weights rotated so that the L2 cache is cold, in a replayed CUDA graph. One whose
result is not that of the chosen tile is marked and never among the best. What does not fit the device is named and left
out, and so is what does not fit the time, the less promising first.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from dataclasses import dataclass
from functools import lru_cache
from itertools import zip_longest
from typing import Any

import torch
from harness import forget_graphs, replayed, synchronize
from random_weights import DEVICE
from tables import write_csv
from tune_cases import DENSE, EXPERTS, TINY_CASES, Case, Run, Tiles

from graftq.quant_linear.gpu.devices import device_of
from graftq.quant_linear.gpu.tile_heuristics import Tile

Job = tuple[Case, Tiles]

PROCESSES = 14
CALLS = 32
FINALISTS = 3
TOLERANCE = 3e-3
SECONDS = 165.0
COMPILING = 0.55
"""The most of the time that goes into compiling."""


def text(tiles: Tiles) -> str:
    def one(tile: Tile) -> str:
        cap = "" if tile.registers is None else f" registers {tile.registers}"
        scaled = " scale_weights" if tile.scale_weights else ""
        size = f"{tile.rows}x{tile.tokens} unroll {tile.unroll} splits {tile.splits}"
        return f"{size} warps {tile.warps} stages {tile.stages}{cap}{scaled}"

    return "; ".join(one(tile) for tile in tiles)


@torch.no_grad()
def compile_some(jobs: list[Job], taken: Any, ready: Any) -> None:
    """One process's part: run jobs that nobody has taken yet, and mark those that ran as ready."""
    torch.set_num_threads(1)
    prepare = lru_cache(maxsize=16)(lambda case: case.prepared(is_cold=False))
    while True:
        with taken.get_lock():
            number = taken.value
            taken.value += 1
        if number >= len(jobs):
            return
        case, tiles = jobs[number]
        try:
            with case.using(tiles):
                prepare(case)(0)
            synchronize()
            ready[number] = True
        except Exception as error:  # more registers or shared memory than there are
            print(f"left out: {case}, {text(tiles)}: {type(error).__name__}: {error}"[:240], flush=True)
            synchronize()  # raises, and so ends this process, if the device has failed it for good


def compiled(
    candidates: dict[Case, list[Tiles]], seconds: float, processes: int = PROCESSES
) -> dict[Case, list[Tiles]]:
    """The chosen tile of each case, and those candidates that are in Triton's cache after so many seconds at most."""
    started = time.monotonic()
    by_rank = zip_longest(*([(case.small(), tiles) for tiles in found] for case, found in candidates.items()))
    jobs = list(dict.fromkeys(job for rank in by_rank for job in rank if job is not None))
    context = multiprocessing.get_context("spawn")
    taken, ready = context.Value("i", 0), context.Array("b", len(jobs))
    workers = [context.Process(target=compile_some, args=(jobs, taken, ready)) for _ in range(processes)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(max(0.0, started + seconds - time.monotonic()))
        worker.terminate()
        worker.join()
    done = {job for job, is_ready in zip(jobs, ready, strict=True) if is_ready}
    print(f"{len(done)} of {len(jobs)} compiled in {time.monotonic() - started:.0f} s", flush=True)
    return {
        case: found[:1] + [tiles for tiles in found[1:] if (case.small(), tiles) in done]
        for case, found in candidates.items()
    }


@dataclass(frozen=True)
class Row:
    """One candidate; ``us`` per call, ``ratio`` to the chosen tile's, relative ``error`` against its output."""

    case: str
    us: float
    ratio: float
    error: float
    tile: str


def attempt(case: Case, run: Run, tiles: Tiles, expected: torch.Tensor) -> tuple[float, float]:
    """Microseconds, and the greatest relative error of a few calls."""
    with case.using(tiles):
        errors = torch.stack([(run(0) - expected).norm() for _ in range(3)]) / expected.norm()
        us = replayed(run, CALLS)
    forget_graphs()
    return us, errors.max().item()


@torch.no_grad()
def tune(case: Case, candidates: list[Tiles]) -> list[Row]:
    """Time ``candidates``, of which the first is the chosen; for two products also the best of each together.

    The best are timed twice more, in turn with the chosen, and count with their medians.
    """
    run = case.prepared(is_cold=True)
    with case.using(candidates[0]):
        expected = run(0).float()
    times: dict[Tiles, list[float]] = {}
    errors: dict[Tiles, float] = {}

    def try_out(tiles: Tiles) -> None:
        try:
            us, error = attempt(case, run, tiles, expected)
        except Exception as reason:
            print(f"left out: {text(tiles)}: {type(reason).__name__}: {reason}"[:240], flush=True)
            synchronize()
            return
        times.setdefault(tiles, []).append(us)
        errors[tiles] = max(error, errors.get(tiles, 0.0))

    def ranking() -> list[Tiles]:
        right = [tiles for tiles in times if errors[tiles] < TOLERANCE]
        return sorted(right, key=lambda tiles: statistics.median(times[tiles]))

    chosen = candidates[0]
    for tiles in candidates:
        try_out(tiles)
    best_of_each = tuple(
        next(tiles[product] for tiles in ranking() if tiles[:product] + tiles[product + 1 :] == others)
        for product, others in ((i, chosen[:i] + chosen[i + 1 :]) for i in range(len(chosen)))
    )
    if best_of_each not in times:
        try_out(best_of_each)
    finalists = dict.fromkeys((chosen, *ranking()[:FINALISTS]))
    for _ in range(2):
        for tiles in finalists:
            try_out(tiles)
    rows = {
        tiles: Row(str(case), statistics.median(us), statistics.median(us) / statistics.median(times[chosen]),
                   errors[tiles], text(tiles))
        for tiles, us in times.items()
    }  # fmt: skip
    lines = [f"{case}: chosen {rows[chosen].us:.1f} us, {text(chosen)}; {len(rows)} tried"]
    for tiles in sorted(finalists, key=lambda tiles: rows[tiles].us):
        if tiles != chosen:
            lines.append(f"  {rows[tiles].us:.1f} us, {rows[tiles].ratio:.3f}: {text(tiles)}")
    for tiles, row in rows.items():
        if not row.error < TOLERANCE:
            lines.append(f"  WRONG, error {row.error:.1e}: {text(tiles)}")
    print("\n".join(lines), flush=True)
    return sorted(rows.values(), key=lambda row: row.us)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", action="store_true", help="projections only")
    parser.add_argument("--experts", action="store_true", help="experts only")
    parser.add_argument("--out", help="write every candidate there, as CSV")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="how long it may take")
    parser.add_argument("--check", action="store_true", help="tiny cases, two candidates each; needs no GPU")
    options = parser.parse_args()

    started = time.monotonic()
    device = device_of(torch.empty(0, device=DEVICE).device)
    cases: tuple[Case, ...] = DENSE * (options.dense or not options.experts)
    cases += EXPERTS * (options.experts or not options.dense)
    if options.check:
        cases = TINY_CASES
    candidates = {case: list(dict.fromkeys(case.candidates(device))) for case in cases}
    if options.check:
        candidates = {case: found[:3] for case, found in candidates.items()}
    else:
        candidates = compiled(candidates, COMPILING * options.seconds)
    rows: list[Row] = []
    for case, found in candidates.items():
        if time.monotonic() - started > options.seconds:
            print(f"no time left for {case}")
            continue
        rows += tune(case, found)
        if options.out:
            write_csv(rows, options.out)
    print(f"{len(rows)} candidates in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
