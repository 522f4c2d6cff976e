"""vLLM's whole engine, with graftq's layers and with vLLM's own, side by side: decoding, first token, loading.

    python benchmarks/mixtral_writer.py FOLDER --branch gptq-4bit-128g-actorder_True
    python benchmarks/engine.py FOLDER [FOLDER ...] [--batches 1 8 32 128] [--tensor-parallel 2] [--csv FILE]

Each pair of a checkpoint and an engine has processes of its own, one after the other. A size is warm, and measured,
when two runs in a row agree within 3 %. What vLLM refuses is a line with its reason. A compilation is a warning of
vLLM's that a kernel was compiled after the engine was ready.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tables import write_csv

PROMPT, NEW = 128, 129
ENGINES = {"graftq": {}, "vLLM": {"GRAFTQ_DISABLE": "1"}}
"""By name, what is set in the environment."""


@dataclass(frozen=True)
class Row:
    """Decoding at one batch size; milliseconds to the first token, and seconds until the engine was ready."""

    checkpoint: str
    engine: str
    gpus: int
    batch: int
    tokens_per_second: float
    first_token_ms: float
    ready_seconds: float
    loading_seconds: float
    compilations: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--settings", type=json.loads, default={}, help="further arguments of vllm.LLM, as JSON")
    parser.add_argument("--csv", help="write every row there")
    parser.add_argument("--plot", help="write a plot there")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        measure(options)
        return
    rows = []
    for folder in options.folders:
        for engine in options.engines:
            found, reason = run(folder, engine, options)
            rows += found
            print("\n".join(map(line, found)) if found else f"{folder.name}, {engine}: {reason}", flush=True)
    if rows and options.csv:
        write_csv(rows, options.csv)
    if rows and options.plot:
        plot(rows, options.plot)


def run(folder: Path, engine: str, options: argparse.Namespace) -> tuple[list[Row], str]:
    """The rows of one engine with one checkpoint, or why there are none."""
    command = [sys.executable, __file__, str(folder), "--child", "--tensor-parallel", str(options.tensor_parallel)]
    command += ["--batches", *map(str, options.batches), "--settings", json.dumps(options.settings)]
    command += ["--engines", engine]
    done = subprocess.run(command, env=os.environ | ENGINES[engine], text=True, capture_output=True, check=False)
    said = done.stdout + done.stderr
    loading = re.search(r"Model loading took .*?([\d.]+) seconds", said)
    common = {
        "checkpoint": folder.name,
        "engine": engine,
        "gpus": options.tensor_parallel,
        "loading_seconds": float(loading[1]) if loading else float("nan"),
        "compilations": len(re.findall(r"(?i)warning.*(?:jit|triton).*compil\w+ during inference", said)),
    }
    found = [json.loads(text.removeprefix("ROW ")) for text in done.stdout.splitlines() if text.startswith("ROW ")]
    errors = [text for text in said.splitlines() if re.search(r"\w(Error|Exception)\b", text)]
    return [Row(**common, **each) for each in found], errors[-1].strip() if errors else f"exit {done.returncode}"


def measure(options: argparse.Namespace) -> None:
    """In a process of its own: start the engine, and print a line for each batch size."""
    from vllm import LLM, SamplingParams

    began = time.perf_counter()
    settings: dict[str, Any] = {"max_model_len": 4096, "skip_tokenizer_init": True, "seed": 0}
    settings["enable_prefix_caching"] = False  # prompts would be cached when the first token is timed
    settings |= options.settings
    if options.engines == ["graftq"]:
        settings["quantization"] = "graftq"
    engine = LLM(str(options.folders[0]), tensor_parallel_size=options.tensor_parallel, **settings)
    ready = time.perf_counter() - began
    vocabulary = engine.llm_engine.model_config.get_vocab_size()

    def seconds(batch: int, new: int) -> float:
        """Of the first run, on new prompts each time, that takes as long as the one before it."""
        parameters = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        before = 0.0
        for attempt in range(8):
            prompts: list[Any] = [
                {"prompt_token_ids": [(7 + 31 * (i + 1) * (attempt + 1) * (j + 1)) % vocabulary for j in range(PROMPT)]}
                for i in range(batch)
            ]
            began = time.perf_counter()
            engine.generate(prompts, parameters, use_tqdm=False)
            taken = time.perf_counter() - began
            if abs(taken - before) < 0.03 * taken:
                break
            before = taken
        return taken

    for batch in options.batches:
        whole, first = seconds(batch, NEW), seconds(batch, 1)
        row = {
            "batch": batch,
            "tokens_per_second": batch * (NEW - 1) / (whole - first),
            "first_token_ms": first * 1e3,
            "ready_seconds": ready,
        }
        print("ROW", json.dumps(row), flush=True)


def line(row: Row) -> str:
    return (
        f"{row.checkpoint}, {row.engine}, {row.gpus} GPU(s), batch {row.batch}: {row.tokens_per_second:.1f} tokens/s, "
        f"first token {row.first_token_ms:.0f} ms; ready after {row.ready_seconds:.0f} s, of which loading "
        f"{row.loading_seconds:.1f}; {row.compilations} compilations afterwards"
    )


def plot(rows: list[Row], path: str) -> None:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for key in dict.fromkeys((row.checkpoint, row.engine) for row in rows):
        mine = [asdict(row) for row in rows if (row.checkpoint, row.engine) == key]
        axis.loglog(
            [row["batch"] for row in mine], [row["tokens_per_second"] for row in mine], "o-", label=", ".join(key)
        )
    axis.set(xlabel="sequences at once", ylabel="tokens per second, all sequences")
    axis.legend(frameon=False)
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
