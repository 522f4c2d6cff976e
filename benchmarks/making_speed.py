"""Time and memory that quantizing takes, as `graftq quantize` does it, for random weights at full width.

    python benchmarks/making_speed.py [--shape Llama-3-8B ...] [--blocks 3] [--tokens 262144] [--profile]
    python benchmarks/making_speed.py --tiny            # small layers, anywhere: does it all run?

Writes a checkpoint of a few blocks with random weights, in bfloat16, and quantizes it from disk to disk, 4 bits, group
128, with random token ids. A block's time is the mean of all but the first, which compiles; the model's is that times
its blocks, and a tenth more for hidden states, the most that writing them takes (`store.WORTH`). Where it goes: `read`
and `write` the files, `observe` runs the calibration tokens up to each layer and sums their moments, `solve` finds the
codes, `advance` moves the hidden states behind the block.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any
from unittest import mock

from harness import synchronize
from random_weights import DEVICE
from tables import write_csv

ROW = 2048
"""Tokens of a calibration row."""


@dataclass(frozen=True)
class Shape:
    """A model: what its configuration says, and how many blocks the whole has."""

    name: str
    kind: str
    blocks: int
    settings: dict[str, int]


ATTENTION = {"num_attention_heads": 32, "max_position_embeddings": 8192}
SHAPES = (
    Shape("Llama-3-8B", "llama", 32, {
        "hidden_size": 4096, "intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256, **ATTENTION}),
    Shape("Mixtral-8x7B", "mixtral", 32, {
        "hidden_size": 4096, "intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 32000,
        "num_local_experts": 8, "num_experts_per_tok": 2, **ATTENTION}),
    Shape("Qwen3-30B-A3B", "qwen3_moe", 48, {
        "hidden_size": 2048, "moe_intermediate_size": 768, "num_key_value_heads": 4, "vocab_size": 151936,
        "num_experts": 128, "num_experts_per_tok": 8, "head_dim": 128, **ATTENTION}),
)  # fmt: skip
TINY = {
    "hidden_size": 256, "intermediate_size": 384, "moe_intermediate_size": 128, "head_dim": 64, "vocab_size": 512,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts": 4,
    "num_experts_per_tok": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """One shape; sizes in GB, times in seconds of one block.

    Attributes:
        peak, hessians, hidden, rest, block: On the device: the peak, and what is in it by design: the second moments
            of the largest unit, the hidden states, embeddings and head, and a block's weights.
        host: The process's peak resident memory.
    """

    shape: str
    blocks: int
    seconds: float
    minutes: float
    read: float
    observe: float
    solve: float
    advance: float
    write: float
    other: float
    peak: float
    hessians: float
    hidden: float
    rest: float
    block: float
    host: float

    @property
    def other_blocks(self) -> float:
        """What the peak holds besides moments, hidden states and embeddings, in sizes of a block."""
        return (self.peak - self.hessians - self.hidden - self.rest) / self.block


class Watch:
    """Times and sizes while quantizing: wraps the functions that do it."""

    def __init__(self, profiled: int | None):
        self.profiled = profiled
        self.seconds: dict[str, float] = defaultdict(float)
        self.inner: list[float] = []
        self.marks: list[tuple[float, dict[str, float]]] = []
        self.sizes: dict[str, int] = defaultdict(int)

    def timed(self, what: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """``call``, whose time counts under ``what``, but for that of timed calls within."""

        @wraps(call)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            synchronize()
            started = time.perf_counter()
            self.inner.append(0.0)
            result = call(*args, **kwargs)
            synchronize()
            spent, inner = time.perf_counter() - started, self.inner.pop()
            self.seconds[what] += spent - inner
            if self.inner:
                self.inner[-1] += spent
            return result

        return wrapped

    def grow(self, what: str, size: int) -> None:
        """Keep the largest size."""
        self.sizes[what] = max(self.sizes[what], size)

    def start(self, stack: ExitStack) -> None:
        """Wrap everything until the stack is left."""
        from graftq.adapters.transformers.making import engine, streaming
        from graftq.adapters.transformers.making.source import FloatCheckpoint
        from graftq.adapters.transformers.making.store import Store

        plain_block, plain_solve = streaming.quantize_block, engine._solve_unit
        plain_drop, plain_rest = FloatCheckpoint.drop_block, FloatCheckpoint.load_rest

        def solve_unit(unit: Any, *args: Any) -> None:
            parts = (unit.moments.gram, unit.moments.drift)
            self.grow("hessians", sum(part.nbytes for part in parts if part is not None))
            plain_solve(unit, *args)

        def quantize_block(block: Any, name: str, streams: Any, *args: Any) -> Any:
            self.grow("block", sum(weight.nbytes for weight in block.parameters()))
            if len(self.marks) == self.profiled:
                return profile(lambda: plain_block(block, name, streams, *args))
            result = plain_block(block, name, streams, *args)
            self.grow("hidden", sum(x.nbytes for x in [*streams.made, *(streams.float or [])]))
            return result

        def drop_block(given: Any, number: int) -> None:
            plain_drop(given, number)
            self.marks.append((time.perf_counter(), dict(self.seconds)))

        def load_rest(given: Any) -> None:
            plain_rest(given)
            self.grow("rest", sum(weight.nbytes for weight in given.model.parameters() if not weight.is_meta))

        for where, name, call in (
            (engine, "_observe", self.timed("observe", engine._observe)),
            (engine, "_solve_unit", self.timed("solve", solve_unit)),
            (streaming, "quantize_block", self.timed("advance", quantize_block)),
            (FloatCheckpoint, "load_block", self.timed("read", FloatCheckpoint.load_block)),
            (FloatCheckpoint, "drop_block", drop_block),
            (FloatCheckpoint, "load_rest", load_rest),
            (Store, "save_tensors", self.timed("write", Store.save_tensors)),
            (Store, "block_done", self.timed("write", Store.block_done)),
        ):
            stack.enter_context(mock.patch.object(where, name, call))

    def mean(self, counted: int) -> tuple[float, dict[str, float]]:
        """Seconds of a block, and of its parts, over the last ``counted``."""
        (first, before), (last, after) = self.marks[-1 - counted], self.marks[-1]
        parts = {what: (seconds - before.get(what, 0.0)) / counted for what, seconds in after.items()}
        return (last - first) / counted, parts


def profile(call: Callable[[], Any]) -> Any:
    """Run under the profiler, and print what the device and the host did most."""
    import torch
    from torch.profiler import ProfilerActivity

    on_device = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_device else [])]
    synchronize()
    started = time.perf_counter()
    with torch.profiler.profile(activities=activities) as profiler:
        result = call()
        synchronize()
        spent = time.perf_counter() - started
    rows = profiler.key_averages()
    busy = sum(row.self_device_time_total for row in rows if "cuda" in str(row.device_type).lower()) / 1e6
    print(f"a block under the profiler: {spent:.2f} s, the device busy for {busy:.2f} s")
    for order in ("self_device_time_total", "self_cpu_time_total") if on_device else ("self_cpu_time_total",):
        print(rows.table(sort_by=order, row_limit=20, max_name_column_width=60), flush=True)
    return result


def write(shape: Shape, blocks: int, folder: str) -> None:
    """A float checkpoint of some blocks with random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(shape.kind, num_hidden_layers=blocks, tie_word_embeddings=False, **shape.settings)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)


def measure(shape: Shape, blocks: int, tokens: int, folder: str, profiled: int | None, answers: Any) -> None:
    """Quantize the checkpoint in ``folder``."""
    import torch
    import transformers.modeling_utils  # noqa: F401 - graftq takes over first

    from graftq.adapters.transformers.making import store
    from graftq.adapters.transformers.making.options import Options
    from graftq.adapters.transformers.making.streaming import quantize_checkpoint

    torch.manual_seed(0)
    rows = list(torch.randint(shape.settings["vocab_size"], (max(tokens // ROW, 1), min(ROW, tokens))))
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    watch = Watch(profiled)
    with ExitStack() as stack:
        watch.start(stack)
        out = Path(folder) / "packed"
        quantize_checkpoint(Path(folder), out, rows, Options(), dtype=dtype, device=torch.device(DEVICE))
    peak = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0
    seconds, parts = watch.mean(blocks - 1)
    sizes = {"peak": peak, "host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, **watch.sizes}
    times = {what: parts[what] for what in ("read", "observe", "solve", "advance", "write")}
    times["other"] = seconds - sum(times.values())
    gigabytes = {what: size / 1e9 for what, size in sizes.items()}
    minutes = seconds * shape.blocks / 60 * (1 + 1 / store.WORTH)
    answers.put(Measured(shape.name, blocks, seconds, minutes, **times, **gigabytes))


def in_a_process(target: Callable[..., None], *arguments: Any) -> None:
    """Run where nothing else has taken memory.

    Raises:
        RuntimeError: if it fails; its traceback is on stderr.
    """
    process = multiprocessing.get_context("spawn").Process(target=target, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{target.__name__}: exit code {process.exitcode}")


def table(rows: list[Measured]) -> str:
    """Markdown."""
    head = (
        "shape", "blocks", "s / block", "min, whole model (extrapolated)", "read", "observe", "solve", "advance",
        "write", "other", "peak GB", "Hessians GB", "hidden states GB", "embeddings GB", "block GB", "other / block",
        "host GB",
    )  # fmt: skip
    lines = [head, ["---"] * len(head)]
    for row in rows:
        first = [row.shape, row.blocks]
        parts = (row.seconds, row.minutes, row.read, row.observe, row.solve, row.advance, row.write, row.other)
        sizes = (row.peak, row.hessians, row.hidden, row.rest, row.block, row.other_blocks, row.host)
        lines.append([*first, *(f"{number:.2f}" for number in (*parts, *sizes))])
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def main() -> None:
    names = [shape.name for shape in SHAPES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=names, default=names, help="only these")
    parser.add_argument("--blocks", type=int, default=3, help="blocks to quantize, two or more")
    parser.add_argument("--tokens", type=int, default=262144)
    parser.add_argument("--folder", help="where the checkpoints go meanwhile; otherwise the system's temporary folder")
    parser.add_argument("--profile", action="store_true", help="the last block under the profiler, which takes longer")
    parser.add_argument("--tiny", action="store_true", help="small layers and 4096 tokens")
    parser.add_argument("--csv", help="write every row there")
    options = parser.parse_args()
    if options.blocks < 2:
        parser.error("--blocks: two or more, since the first is not counted")
    answers = multiprocessing.get_context("spawn").SimpleQueue()
    rows = []
    for shape in SHAPES:
        if shape.name not in options.shape:
            continue
        tokens = options.tokens
        if options.tiny:
            small = {name: TINY.get(name, value) for name, value in shape.settings.items()}
            shape, tokens = Shape(shape.name, shape.kind, shape.blocks, small), 4096
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            in_a_process(write, shape, options.blocks, folder)
            profiled = options.blocks - 1 if options.profile else None
            in_a_process(measure, shape, options.blocks, tokens, folder, profiled, answers)
        rows.append(answers.get())
        print(table(rows[-1:]), flush=True)
    print(table(rows))
    if options.csv:
        write_csv(rows, options.csv)


if __name__ == "__main__":
    main()
