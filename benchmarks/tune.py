"""Try other tiles than ``tiles`` and ``experts_tiles`` choose, where targets are missed; a person puts in the better.

    python benchmarks/tune.py [--dense] [--experts] [--out tune.csv]     # neither: both
    TRITON_INTERPRET=1 python benchmarks/tune.py --check                 # tiny, anywhere: does it all run?

First several processes compile what will be tried, each kernel once for all shapes that share it, into Triton's cache.
Then one process times each candidate, weights rotated so that the L2 cache is cold, in a replayed CUDA graph. One whose
result is not that of the chosen tile is marked and never among the best. What does not fit the device is named and left
out, and so is what does not fit the time, the less promising first.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import zip_longest
from typing import Any
from unittest import mock

import torch
from dense import bytes_read
from harness import COLD_BYTES, replayed, write_csv
from moe import (
    DEVICE,
    LAYERS,
    MAIN,
    TINY,
    Layer,
    Weights,
    bytes_per_expert,
    random_experts,
    random_routing,
    random_tensors,
    spec_of,
)

from graftq.quant_linear import experts_launches, experts_ops, tiled_product
from graftq.quant_linear.devices import device_of
from graftq.quant_linear.experts_tiles import choose_matrix, choose_tokens, choose_vector, slots_per_expert
from graftq.quant_linear.tiles import Device, Tile, choose
from graftq.quant_linear.triton_provider import TritonProvider
from graftq.quant_linear.workspace import forget_graphs

Tiles = tuple[Tile, ...]
"""One for each product."""

PROCESSES = 14
CALLS = 32
FINALISTS = 3
TOLERANCE = 3e-3
SECONDS = 165.0
COMPILING = 0.55
"""The most of the time that goes into compiling."""


def vector(rows: int, unroll: int, programs: int, registers: int | None = None, warps: int = 4) -> Tile:
    return Tile(rows, 1, unroll, programs, warps, 1, registers)


def matrix(
    rows: int, tokens: int, unroll: int, programs: int, stages: int = 3, registers: int | None = None, warps: int = 4
) -> Tile:
    return Tile(rows, tokens, unroll, programs, warps, stages, registers, scale_weights=rows * tokens >= 16384)


# Recipes: tiles whose ``splits`` is how many programs each processor shall have; the most promising first. Registers as
# compiled for sm_90 without a cap: 64x1 55, 56 and 76 (unroll 1, 2, 4), 128x1 94; with 3 bits 60, 72, 86 (2, 4, 8) and
# 120, 87 (128 rows; 2, 4); 64x16 71 and 80; 64x64 156 and 168; 128x64 126 (8 warps) and 254 (4); 128x128 159.
VECTOR = (
    vector(64, 1, 8), vector(64, 4, 6), vector(128, 2, 5), vector(64, 2, 8), vector(64, 4, 8, 64), vector(64, 2, 9),
    vector(64, 2, 10, 48), vector(64, 1, 12, 40), vector(128, 2, 4), vector(64, 1, 16), vector(64, 2, 6),
    vector(128, 1, 5), vector(128, 2, 8, 64), vector(128, 4, 4), vector(64, 2, 16), vector(128, 4, 5, 96),
    vector(64, 1, 9), vector(128, 2, 4, warps=8),
)  # fmt: skip
VECTOR_3_BITS = (
    vector(128, 4, 5), vector(64, 4, 7), vector(128, 2, 4), vector(64, 2, 10, 48), vector(64, 4, 8, 64),
    vector(64, 1, 12, 40), vector(128, 4, 8, 64), vector(64, 2, 8), vector(128, 2, 6, 80), vector(64, 8, 5),
    vector(128, 4, 10), vector(64, 4, 14), vector(128, 2, 8), vector(64, 1, 16), vector(128, 2, 5, 96),
    vector(64, 8, 8, 64),
)  # fmt: skip
FEW_TOKENS = (
    matrix(64, 16, 1, 7), matrix(64, 16, 2, 5), matrix(64, 16, 1, 6), matrix(64, 16, 1, 4), matrix(64, 16, 2, 4),
    matrix(64, 16, 2, 6, 2), matrix(64, 16, 1, 7, 2), matrix(64, 16, 1, 5, 4), matrix(64, 16, 1, 8, 3, 64),
    matrix(64, 16, 2, 5, 2), matrix(64, 16, 1, 7, 4), matrix(64, 16, 2, 8, 2, 64), matrix(64, 16, 2, 3),
    matrix(64, 16, 1, 5, 2), matrix(64, 16, 1, 5, 5), matrix(64, 16, 1, 5), matrix(64, 16, 1, 3),
)  # fmt: skip
TOKENS_64 = (
    matrix(64, 64, 2, 4), matrix(64, 64, 2, 2), matrix(64, 64, 1, 3), matrix(64, 64, 1, 4, 2, 128),
    matrix(64, 64, 1, 3, 3, 168), matrix(128, 64, 1, 2, 3, 128, warps=8), matrix(64, 64, 1, 2), matrix(64, 64, 2, 2, 2),
    matrix(64, 64, 1, 4, 3, 128), matrix(128, 64, 1, 2), matrix(64, 64, 2, 4, 2, 128), matrix(64, 64, 1, 3, 4),
    matrix(128, 64, 1, 1, 3, warps=8), matrix(64, 64, 1, 3, 2), matrix(128, 64, 1, 2, 2, 128, warps=8),
    matrix(128, 64, 1, 1, 4, warps=8), matrix(64, 64, 1, 2, 4), matrix(128, 64, 1, 2, 2),
    matrix(128, 64, 2, 1, 3, warps=8), matrix(64, 64, 1, 7, 2, 128),
)  # fmt: skip
TOKENS_128 = (
    matrix(64, 64, 1, 4, 3, 128), matrix(64, 64, 1, 3), matrix(128, 64, 1, 2, 3, 128, warps=8), matrix(64, 64, 2, 2),
    matrix(128, 128, 1, 1, warps=8), matrix(64, 64, 1, 4, 2, 128), matrix(128, 64, 1, 2), matrix(64, 64, 2, 4),
    matrix(128, 64, 1, 1, warps=8), matrix(128, 128, 1, 2, 3, 128, warps=8), matrix(64, 64, 1, 2),
    matrix(128, 64, 1, 2, 4, 128, warps=8), matrix(128, 128, 1, 2, 2, 128, warps=8), matrix(64, 64, 1, 3, 4),
    matrix(128, 128, 1, 1, 4, warps=8), replace(matrix(128, 128, 1, 1, warps=8), scale_weights=False),
)  # fmt: skip


def recipes(bits: int, tokens: int) -> tuple[Tile, ...]:
    """For so many tokens of a dense layer; experts have 1 or few."""
    if tokens == 1:
        return VECTOR_3_BITS if bits == 3 else VECTOR
    return FEW_TOKENS if tokens <= 16 else TOKENS_64 if tokens <= 64 else TOKENS_128


def fitted(recipe: Tile, device: Device, tiles: int, atoms: int) -> Iterator[Tile]:
    """The recipe's tile where there are ``tiles`` such, none of its splits without atoms; none if it does not fit."""
    if atoms % recipe.unroll == 0:
        most = max(1, min(32, recipe.splits * device.processors // tiles))
        useful = {-(-atoms // each) for each in range(recipe.unroll, atoms + 1, recipe.unroll)}
        yield replace(recipe, splits=max(splits for splits in useful if splits <= most))


def text(tiles: Tiles) -> str:
    def one(tile: Tile) -> str:
        cap = "" if tile.registers is None else f" registers {tile.registers}"
        scaled = " scale_weights" if tile.scale_weights else ""
        size = f"{tile.rows}x{tile.tokens} unroll {tile.unroll} splits {tile.splits}"
        return f"{size} warps {tile.warps} stages {tile.stages}{cap}{scaled}"

    return "; ".join(one(tile) for tile in tiles)


Run = Callable[[int], torch.Tensor]
"""The i-th call: its output."""


@dataclass(frozen=True)
class Dense:
    """One projection, symmetric, group 128, fp16."""

    bits: int
    k: int
    n: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.bits}-bit {self.k}x{self.n} M={self.tokens}"

    def candidates(self, device: Device) -> Iterator[Tiles]:
        """The chosen tile, then others; some twice."""
        chosen = choose(device, self.bits, 128, self.n, self.k, self.tokens)
        assert chosen is not None
        yield (chosen,)
        for recipe in recipes(self.bits, self.tokens):
            tiles = -(-self.n // recipe.rows) * -(-self.tokens // recipe.tokens)
            for tile in fitted(recipe, device, tiles, self.k // 128):
                yield (tile,)

    def small(self) -> Dense:
        """A case of the same kernels: numbers are multiples of 16 as before, and the rest is equal."""
        return replace(self, k=2048, n=2048)

    def prepared(self, is_cold: bool) -> Run:
        """Random weights, and enough copies of them if the L2 cache is to be cold."""
        spec = spec_of(self.k, self.n, Weights(self.bits))
        provider = TritonProvider()
        first = provider.layout(spec).pack(random_tensors(spec, None))
        copies = COLD_BYTES // bytes_read(first) if is_cold else 0
        sets = [first] + [{name: tensor.clone() for name, tensor in first.items()} for _ in range(copies)]
        x = torch.randn(self.tokens, self.k, device=DEVICE).half()
        return lambda i: provider.linear(x, sets[i % len(sets)], spec)

    @contextmanager
    def using(self, tiles: Tiles) -> Iterator[None]:
        """With these tiles instead of the chosen."""
        tiled_product.product_for.cache_clear()
        with mock.patch.object(tiled_product, "choose", return_value=tiles[0]):
            yield
        tiled_product.product_for.cache_clear()


@dataclass(frozen=True)
class Experts:
    """One layer's experts; two tiles, of the first product and the second."""

    layer: Layer
    weights: Weights
    tokens: int

    def __str__(self) -> str:
        return f"{self.layer.name} {self.weights} T={self.tokens}"

    @property
    def _products(self) -> tuple[tuple[int, int], ...]:
        """Output rows and atoms of both."""
        hidden, inner = self.layer.hidden, self.layer.inner
        return (2 * inner, hidden // 128), (hidden, inner // 128)

    def candidates(self, device: Device) -> Iterator[Tiles]:
        """The chosen tiles, then one of them replaced, in turn the first and the second; some twice."""
        bits, experts, top_k = self.weights.bits, self.layer.experts, self.layer.top_k
        slots = self.tokens * top_k
        block = choose_tokens(slots, experts)
        up, down = (
            choose_vector(device, bits, n, atoms, top_k)
            if self.tokens == 1
            else choose_matrix(device, bits, n, atoms, slots, experts, block)
            for n, atoms in self._products
        )
        yield up, down
        shares = top_k if self.tokens == 1 else round(slots / slots_per_expert(slots, experts))
        for recipe in recipes(bits, self.tokens):
            (up_n, up_atoms), (down_n, down_atoms) = self._products
            for tile in fitted(recipe, device, -(-up_n // recipe.rows) * shares, up_atoms):
                yield tile, down
            for tile in fitted(recipe, device, -(-down_n // recipe.rows) * shares, down_atoms):
                yield up, tile

    def small(self) -> Experts:
        """A case of the same kernels, as :meth:`Dense.small`."""
        layer = self.layer
        sizes = {"experts": min(layer.experts, 16), "hidden": min(layer.hidden, 2048), "inner": min(layer.inner, 2048)}
        return replace(self, layer=replace(layer, **sizes))

    def prepared(self, is_cold: bool) -> Run:
        """Random weights and routing, and copies of the weights if the L2 cache is to be cold."""
        first = random_experts(self.layer, self.weights)
        copies = max(1, int(COLD_BYTES // (bytes_per_expert(first) * self.layer.top_k)) // 2) if is_cold else 0
        modules = [first] + [copy.deepcopy(first) for _ in range(copies)]
        shape = (self.tokens, self.layer.hidden)
        inputs = [
            (torch.randn(shape, device=DEVICE).half(), *random_routing(self.layer, self.tokens)) for _ in range(16)
        ]
        return lambda i: modules[i % len(modules)](*inputs[i % len(inputs)])

    @contextmanager
    def using(self, tiles: Tiles) -> Iterator[None]:
        """With these tiles instead of the chosen."""
        wide = self._products[0][0]

        def pick(device: Device, bits: int, n: int, *_: int) -> Tile:
            return tiles[0] if n == wide else tiles[1]

        experts_ops.layer_for.cache_clear()
        vectors = mock.patch.object(experts_ops, "choose_vector", pick)
        matrices = mock.patch.object(experts_launches, "choose_matrix", pick)
        with vectors, matrices:
            yield
        experts_ops.layer_for.cache_clear()


Case = Dense | Experts
Job = tuple[Case, Tiles]

SHAPES = ((8192, 8192), (14336, 4096), (4096, 28672), (4096, 4096))
DENSE = tuple(
    Dense(bits, *shape, tokens)
    for bits, tokens, shapes in (
        (4, 64, SHAPES), (3, 1, SHAPES), (4, 1, SHAPES), (4, 16, SHAPES), (3, 16, SHAPES), (4, 128, SHAPES),
        (8, 1, SHAPES[:2]),
    )
    for shape in shapes
)  # fmt: skip
MIXTRAL, QWEN3 = LAYERS
EXPERTS = (
    Experts(MIXTRAL, MAIN, 1),
    Experts(MIXTRAL, replace(MAIN, bits=3), 1),
    Experts(MIXTRAL, MAIN, 4),
    Experts(MIXTRAL, MAIN, 2),
    Experts(QWEN3, MAIN, 1),
)
TINY_CASES = (
    Dense(4, 256, 128, 1),
    Dense(3, 256, 128, 16),
    Dense(4, 256, 128, 64),
    Experts(TINY[0], MAIN, 1),
    Experts(TINY[0], replace(MAIN, bits=3), 2),
)


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


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def compiled(jobs: list[Job], seconds: float, processes: int) -> set[Job]:
    """Those of ``jobs``, which are small cases, that are in Triton's cache after so many seconds at most."""
    context = multiprocessing.get_context("spawn")
    taken, ready = context.Value("i", 0), context.Array("b", len(jobs))
    workers = [context.Process(target=compile_some, args=(jobs, taken, ready)) for _ in range(processes)]
    end = time.monotonic() + seconds
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(max(0.0, end - time.monotonic()))
        worker.terminate()
        worker.join()
    return {job for job, is_ready in zip(jobs, ready, strict=True) if is_ready}


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
        by_rank = zip_longest(*([(case.small(), tiles) for tiles in found] for case, found in candidates.items()))
        jobs = list(dict.fromkeys(job for rank in by_rank for job in rank if job is not None))
        ready = compiled(jobs, COMPILING * options.seconds, PROCESSES)
        print(f"{len(ready)} of {len(jobs)} compiled in {time.monotonic() - started:.0f} s", flush=True)
        candidates = {
            case: found[:1] + [tiles for tiles in found[1:] if (case.small(), tiles) in ready]
            for case, found in candidates.items()
        }
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
