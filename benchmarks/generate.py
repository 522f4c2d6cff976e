"""Tokens per second out of plain ``from_pretrained`` and ``generate``: loading, prefill, decoding, a step in parts.

    python benchmarks/mixtral_writer.py FOLDER --branch gptq-4bit-128g-actorder_True
    python benchmarks/generate.py FOLDER [--batches 1 4 8 32] [--modes eager static] [--csv FILE] [--plot FILE]
    torchrun --nproc-per-node 2 benchmarks/generate.py FOLDER    # tensor parallel: a GPU for each process, one prints

Modes: eager; static (a static cache, which transformers compiles for); continuous (``generate_batch``); padded (the
same, each step padded to fewer tokens and keys than by default); loop (eager, with experts one by one, as without a
kernel for all of them; comes last, since it rearranges the model).
A step's fraction is the time in which the weights it needs (packed, of the experts its tokens chose; a process's share
of them) could be read at the bandwidth measured in the same run, over the time it took.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from harness import sampled_peak, synchronize, timed
from tables import results, write_csv
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from graftq.quant_linear.experts import QuantExperts

BATCHED = ("continuous", "padded")
MODES = ("eager", "static", *BATCHED, "loop")
PROMPT = 128
LONG_PROMPT = 3696
CATEGORIES = {
    "experts": ("experts_matrix", "up_vector", "down_vector", "prepare_kernel", "weighted_sum"),
    "packed layers": ("matrix_kernel", "vector_kernel", "gather_kernel", "dequantize_kernel"),
    "attention": ("flash", "fmha", "attention", "sdpa"),
    "matmul": ("gemm", "gemv", "cutlass", "cublas", "splitk"),
    "written by torch.compile": ("triton_",),
    "copies": ("memcpy", "memset", "copy"),
    "between GPUs": ("nccl",),
}
"""What a kernel's name contains, by what it belongs to; torch.compile writes norms, rotary and writes to caches."""


@dataclass(frozen=True)
class Row:
    """Decoding at one batch size: ``ms`` a step, tokens a second, distinct experts per layer and step."""

    mode: str
    gpus: int
    batch: int
    ms: float
    tokens_per_second: float
    distinct_experts: float
    fraction: float
    first_token_ms: float
    compile_seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8, 32])
    parser.add_argument("--modes", nargs="+", default=["eager", "static"], choices=MODES)
    parser.add_argument("--new-tokens", type=int, default=129)
    parser.add_argument("--prompt", type=int, default=PROMPT)
    parser.add_argument("--long-prompt", type=int, default=LONG_PROMPT)
    parser.add_argument("--csv", help="write every row there")
    parser.add_argument("--plot", help="write a plot there")
    options = parser.parse_args()

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if os.environ.get("RANK", "0") != "0":
        sys.stdout = io.StringIO()
        options.csv = options.plot = None
    torch.manual_seed(0)  # all processes must be given the same prompts
    print(f"{_device_name()}; torch {torch.__version__}, transformers {transformers.__version__}")
    model = _load(options.folder)
    bandwidth = read_bandwidth()
    print(f"read bandwidth: {bandwidth / 1e9:.0f} GB/s")
    for length in (options.prompt, options.long_prompt):
        seconds = _median(lambda length=length: _generate(model, _prompts(model, 1, length), 1))
        print(f"prefill of {length} tokens: {seconds * 1e3:.1f} ms, {length / seconds:.0f} tokens/s")
    rows = []
    for mode in sorted(options.modes, key=MODES.index):
        if mode == "loop":
            for experts in _experts(model):
                experts.separate = True
        for batch in options.batches:
            try:
                rows.append(_decode(model, mode, batch, options.prompt, options.new_tokens, bandwidth))
            except (RuntimeError, ValueError) as error:  # of torch.compile, of memory, of what a mode does not do
                print(f"{_what(mode, batch)}: {type(error).__name__}: {str(error).strip().splitlines()[0]}", flush=True)
            else:
                print(_line(rows[-1]), flush=True)
        if mode not in BATCHED and any(row.mode == mode for row in rows):
            print(_breakdown(model, mode, options.prompt))
    if options.csv:
        write_csv(rows, options.csv)
    if options.plot:
        _plot(rows, options.plot)


def _device_name() -> str:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return f"{_processes()} x {name}" if _processes() > 1 else name


def _processes() -> int:
    """How many share the model, each with a device of its own."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _median(call: Callable[[], object]) -> float:
    call()
    return statistics.median(timed(call) for _ in range(3))


def read_bandwidth() -> float:
    """Bytes per second of a sum over memory that no cache holds."""
    size = 2**30 if torch.cuda.is_available() else 2**27
    data = torch.ones(size, device="cuda" if torch.cuda.is_available() else "cpu")
    return data.nbytes / min(timed(data.sum) for _ in range(10))


def _own_memory() -> int:
    """Resident bytes of this process that are not pages of files, which the system can drop at any time."""
    with open("/proc/self/status", encoding="ascii") as status:
        return sum(int(line.split()[1]) * 1024 for line in status if line.startswith(("RssAnon", "RssShmem")))


def _load(folder: Path) -> Any:
    files = [path.stat().st_size for path in folder.glob("*.safetensors")]
    loaded: list[Any] = []
    device = "cuda" if torch.cuda.is_available() else "cpu"
    place: dict[str, Any] = {"device_map": device}
    if _processes() > 1:
        from transformers.distributed import DistributedConfig

        place = {"distributed_config": DistributedConfig(tp_size=_processes(), tp_plan="auto")}
    with sampled_peak(_own_memory) as host:
        seconds = timed(lambda: loaded.append(AutoModelForCausalLM.from_pretrained(folder, **place)))
    model = loaded[0]
    held = _bytes(model)
    print(f"loaded {sum(files) / 1e9:.2f} GB in {seconds:.1f} s: {sum(files) / 1e9 / seconds:.2f} GB/s")
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated()
        print(f"GPU memory: peak {peak / 1e9:.2f} GB, {peak / held:.3f} of the {held / 1e9:.2f} GB held")
    print(f"host memory: peak +{host[0] / 1e9:.2f} GB; the largest file has {max(files) / 1e9:.2f} GB")
    return model


def _prompts(model: Any, batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, model.config.vocab_size, (batch, length), device=model.device)


def _generate(model: Any, inputs: torch.Tensor, count: int, mode: str = "eager") -> object:
    arguments: dict[str, Any] = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
    arguments["pad_token_id"] = 0
    if mode in BATCHED:
        config = transformers.GenerationConfig(eos_token_id=-1, **arguments)
        paddings = {"q_padding_interval_size": 16, "kv_padding_interval_size": 2048} if mode == "padded" else {}
        batching = transformers.ContinuousBatchingConfig(**paddings)
        return model.generate_batch(inputs.tolist(), config, batching, warmup=False)
    if mode == "static":
        arguments["cache_implementation"] = "static"
    return model.generate(inputs, attention_mask=torch.ones_like(inputs), **arguments)


def _decode(model: Any, mode: str, batch: int, length: int, count: int, bandwidth: float) -> Row:
    inputs = _prompts(model, batch, length)
    # The static cache's length belongs to the compiled graph: both measurements must ask for the same.
    first_call = timed(lambda: _generate(model, inputs, count, mode))
    graphs = counters["stats"]["unique_graphs"]
    whole = _median(lambda: _generate(model, inputs, count, mode))
    first = _median(lambda: _generate(model, inputs, 1, mode))
    if mode == "static":
        new, breaks = counters["stats"]["unique_graphs"] - graphs, sum(counters["graph_break"].values())
        print(f"  static, batch {batch}: {new} recompilations after warm-up, {breaks} graph breaks")
    step = (whole - first) / (count - 1)
    distinct = _distinct_experts(model, inputs)
    needed = _step_bytes(model, distinct)
    fraction = needed / bandwidth / step
    times = (first * 1e3, first_call - whole)
    return Row(mode, _processes(), batch, step * 1e3, batch / step, distinct, fraction, *times)


def _distinct_experts(model: Any, inputs: torch.Tensor, steps: int = 8) -> float:
    """Mean over layers and decoding steps."""
    found: list[int] = []

    def count(module: QuantExperts, arguments: tuple[torch.Tensor, ...]) -> None:
        if len(arguments[0]) == len(inputs):  # a step, not the prompt
            found.append(len(torch.unique(arguments[1])))

    hooks = [module.register_forward_pre_hook(count) for module in _experts(model)]
    _generate(model, inputs, steps)
    for hook in hooks:
        hook.remove()
    return statistics.mean(found) if found else 0.0


def _experts(model: Any) -> list[QuantExperts]:
    return [module for module in model.modules() if isinstance(module, QuantExperts)]


def _bytes(module: Any) -> int:
    """What this process holds."""
    tensors = (*module.parameters(), *module.buffers())
    return sum((tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes for tensor in tensors)


def _step_bytes(model: Any, distinct: float) -> float:
    """Bytes of the weights that one step reads: the embedding's rows are nothing beside them."""
    total = _bytes(model) - model.get_input_embeddings().weight.nbytes
    for experts in _experts(model):
        total -= _bytes(experts) * (1 - distinct / experts.num_experts)
    return total


def _breakdown(model: Any, mode: str, length: int, steps: int = 16) -> str:
    """Device time of a decoding step at batch 1 by kind of kernel, from a profile of ``steps`` steps."""
    if not torch.cuda.is_available():
        return "  (a breakdown needs a GPU)"
    inputs = _prompts(model, 1, length)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]

    def profile(count: int) -> tuple[dict[str, float], int, int]:
        _generate(model, inputs, count, mode)
        with torch.profiler.profile(activities=activities) as profiler:
            _generate(model, inputs, count, mode)
            synchronize()
        events = profiler.events() or []
        kernels = sorted(
            (event.time_range.start, event.time_range.end, event.name)
            for event in events
            if event.device_type == torch.autograd.DeviceType.CUDA
        )
        times: dict[str, float] = defaultdict(float)
        busy_until = 0.0
        for start, end, name in kernels:  # one may start before the last ends: time belongs to the first
            times[name] += max(0.0, end - max(start, busy_until))
            busy_until = max(busy_until, end)
        return times, len(kernels), sum(event.name == "cudaGraphLaunch" for event in events)

    (short, few, _), (long, many, replays) = profile(1), profile(1 + steps)
    each = {name: (time - short.get(name, 0.0)) / steps for name, time in long.items()}
    kinds = dict.fromkeys((*CATEGORIES, "other"), 0.0)
    for name, time in each.items():
        kinds[_category(name)] += time
    parts = ", ".join(f"{kind} {time:.0f}" for kind, time in kinds.items())
    longest = "\n".join(
        f"    {each[name]:7.1f} {name[:100]}" for name in sorted(each, key=lambda name: -each[name])[:15]
    )
    count = f"{(many - few) / steps:.0f} kernels, {replays} graph launches in all"
    return f"  {mode}, batch 1, us a step on the device: {parts}; {count}; the longest:\n{longest}"


def _category(name: str) -> str:
    lowered = name.lower()
    return next((kind for kind, parts in CATEGORIES.items() if any(part in lowered for part in parts)), "other")


def _what(mode: str, batch: int) -> str:
    gpus = f", {_processes()} GPUs" if _processes() > 1 else ""
    return f"{mode}{gpus}, batch {batch}"


def _line(row: Row) -> str:
    return (
        f"{_what(row.mode, row.batch)}: {row.ms:.2f} ms a step, {row.tokens_per_second:.1f} tokens/s, "
        f"{row.fraction:.2f} of the roof, {row.distinct_experts:.1f} experts a layer; "
        f"first token {row.first_token_ms:.0f} ms, first call {row.compile_seconds:+.1f} s"
    )


def _plot(rows: list[Row], path: str) -> None:
    import matplotlib.pyplot as plt

    curves: dict[str, dict[int, float]] = {}
    for row in rows:
        curves.setdefault(f"graftq, {row.mode}", {})[row.batch] = row.tokens_per_second
    for peer in results("engine_h100.csv"):
        if peer["weights"] != "graftq" and peer["gpus"] == "1":
            order = "act-order" if peer["act_order"] == "yes" else "no act-order"
            times = curves.setdefault(f"{peer['engine']}, {order} (recorded)", {})
            times[int(peer["sequences"])] = float(peer["tokens_per_second"])
    figure, axis = plt.subplots(figsize=(9, 5))
    for name, times in curves.items():
        axis.loglog(list(times), list(times.values()), "o-" if name.startswith("graftq") else "s:", label=name)
    axis.set(xlabel="sequences at once", ylabel="tokens per second, all sequences together")
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(path, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()
