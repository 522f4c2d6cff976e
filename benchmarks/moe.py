"""Time of the quantised experts of one layer on a GPU, beside transformers' bf16 grouped experts and recorded kernels.

    python benchmarks/moe.py [--csv moe.csv] [--plot moe.png]
    TRITON_INTERPRET=1 python benchmarks/moe.py --check       # tiny layers, anywhere: does it all run, and right?

Random routing, another one for each call; layers are rotated so that the L2 cache is cold, calls replayed from a CUDA
graph, figures are medians. A fraction is of the read bandwidth measured in the same run: bytes of the packed codes and
scales of those experts that have tokens, over the time.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from harness import (
    COLD_BYTES,
    host_microseconds,
    matmul_rate,
    read_bandwidth,
    recorded,
    replayed,
    report_first_calls,
    write_csv,
)

from graftq.quant_linear.experts import QuantExpert, QuantExperts
from graftq.quant_linear.layouts import GptqTensors
from graftq.quant_linear.linear import QuantLinear
from graftq.quant_linear.packing import dequantize
from graftq.quant_linear.reference import TorchProvider
from graftq.quant_linear.selection import Selection
from graftq.quant_linear.spec import QuantSpec
from graftq.quant_linear.triton_experts import TritonExperts
from graftq.quant_linear.workspace import forget_graphs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
FEW_TOKENS = (1, 2, 4, 8, 16, 256)


@dataclass(frozen=True)
class Layer:
    """The experts of one layer of a model."""

    name: str
    experts: int
    top_k: int
    hidden: int
    inner: int


@dataclass(frozen=True)
class Weights:
    """How they are quantised; ``group`` -1 for one group."""

    bits: int = 4
    group: int = 128
    act_order: bool = False

    def __str__(self) -> str:
        return f"{self.bits}-bit g{self.group}{' act-order' if self.act_order else ''}"


LAYERS = (Layer("Mixtral-8x7B", 8, 2, 4096, 14336), Layer("Qwen3-30B-A3B", 128, 8, 2048, 768))
MAIN = Weights(act_order=True)
OTHERS = (Weights(), Weights(group=-1), Weights(bits=3), Weights(bits=8))
TINY = (Layer("tiny", 3, 2, 128, 128),)


@dataclass(frozen=True)
class Row:
    """One measurement; ``us`` per call, ``fraction`` of the read bandwidth, ``bf16_us`` of grouped experts."""

    layer: str
    weights: str
    m: int
    experts_touched: float
    us: float
    fraction: float
    tflops: float
    bf16_us: float


def spec_of(k: int, n: int, weights: Weights) -> QuantSpec:
    group = k if weights.group == -1 else weights.group
    return QuantSpec(
        bits=weights.bits, in_features=k, out_features=n, group_size=group, num_groups=k // group,
        desc_act=weights.act_order, sym=True, zero_offset=1, padded_in=k, padded_out=n,
        stored_g_idx=k if weights.act_order else 0, stored_bias=0,
    )  # fmt: skip


def random_tensors(spec: QuantSpec, g_idx: torch.Tensor | None) -> GptqTensors:
    """Any bits are valid codes; centred, so that routing and sums behave."""
    zero = 2 ** (spec.bits - 1) - 1
    stream = sum(zero << shift for shift in range(0, 32 * spec.bits, spec.bits))
    words = [(stream >> (32 * word) & 0xFFFFFFFF) for word in range(spec.bits)]
    words = [word - 2**32 if word >= 2**31 else word for word in words]
    zeros = torch.tensor(words, dtype=torch.int32, device=DEVICE).repeat(spec.packed_zero_columns // spec.bits)
    size = (spec.packed_rows, spec.out_features)
    scales = (torch.rand(spec.num_groups, spec.out_features, device=DEVICE) + 0.5) * 2 ** (4 - spec.bits) / 256
    return GptqTensors(
        torch.randint(-(2**31), 2**31, size, device=DEVICE, dtype=torch.int64).to(torch.int32),
        zeros.expand(spec.num_groups, -1).contiguous(),
        scales.half(),
        g_idx,
    )


def random_experts(layer: Layer, weights: Weights) -> QuantExperts:
    """A layer as it is after loading, bound to the fused kernels."""

    def order(k: int) -> torch.Tensor | None:
        if not weights.act_order:
            return None
        return (torch.randperm(k, device=DEVICE) // weights.group).to(torch.int32)

    def linear(k: int, n: int, g_idx: torch.Tensor | None) -> QuantLinear:
        spec = spec_of(k, n, weights)
        tensors = random_tensors(spec, g_idx)
        return QuantLinear.from_tensors(spec, tensors, lambda request: Selection(TorchProvider(), {}), torch.float16)

    experts = []
    for _ in range(layer.experts):
        shared = order(layer.hidden)
        experts.append(
            QuantExpert(
                {
                    "gate_proj": linear(layer.hidden, layer.inner, shared),
                    "up_proj": linear(layer.hidden, layer.inner, shared),
                    "down_proj": linear(layer.inner, layer.hidden, order(layer.inner)),
                }
            )
        )
    module = QuantExperts(experts, lambda request: Selection(TritonExperts(), {}), silu_and_multiply)
    module.bind(DEVICE, torch.float16)
    return module


def silu_and_multiply(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def random_routing(layer: Layer, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts and weights [tokens, top_k], from zero-mean logits."""
    weights, index = torch.randn(tokens, layer.experts, device=DEVICE).softmax(-1).topk(layer.top_k)
    return index, weights / weights.sum(-1, keepdim=True)


def bytes_per_expert(module: QuantExperts) -> float:
    """What a symmetric product must read of an expert that has tokens."""
    names = [f"tiled_{stack}_{name}" for stack in ("up", "down") for name in ("codes", "high", "scales")]
    packed = module.packed()
    return sum(packed[name].nbytes for name in names if name in packed) / module.num_experts


def grouped_bf16(layer: Layer) -> Any:
    """transformers' own experts of that size, on its grouped kernels."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(
        num_experts=layer.experts, num_experts_per_tok=layer.top_k, hidden_size=layer.hidden,
        moe_intermediate_size=layer.inner, hidden_act="silu",
    )  # fmt: skip
    config._experts_implementation = "grouped_mm"
    with torch.device(DEVICE):
        module = Qwen3MoeExperts(config).bfloat16()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
        parameter.requires_grad_(False)
    return module


def check(module: QuantExperts, layer: Layer, tokens: int) -> float:
    """Relative error against float32 products of dequantised weights."""
    index, weights = random_routing(layer, tokens)
    x = torch.randn(tokens, layer.hidden, device=DEVICE).half()
    expected = torch.zeros(tokens, layer.hidden, device=DEVICE)
    for expert in torch.unique(index).tolist():
        token, slot = torch.where(index == expert)
        plain = {
            name: dequantize(module.checkpoint_tensors(name, expert), specs[expert])
            for name, specs in module.spec.projections
        }
        both = torch.cat((x[token].float() @ plain["gate_proj"].T, x[token].float() @ plain["up_proj"].T), -1)
        expected.index_add_(0, token, silu_and_multiply(both) @ plain["down_proj"].T * weights[token, slot, None])
    found = module(x, index, weights)
    return ((found - expected).norm() / expected.norm()).item()


def measure(
    layer: Layer, weights: Weights, tokens: tuple[int, ...], bandwidth: float, bf16: dict[int, float]
) -> Iterator[Row]:
    """One row per number of tokens; fills ``bf16`` where it lacks one."""
    first = random_experts(layer, weights)
    for m in tokens[:1] + tokens[-2:-1]:
        error = check(first, layer, m)
        print(f"{layer.name}, {weights}, M={m}: relative error {error:.1e}", flush=True)
        if not error < 3e-3:
            raise SystemExit("wrong result: nothing worth timing")
    size = bytes_per_expert(first)
    # A call must not find the experts of the call before last in the cache.
    others = max(1, int(COLD_BYTES // (size * layer.top_k)) // 2)
    modules = [first] + [random_experts(layer, weights) for _ in range(others)]
    plain = grouped_bf16(layer)
    for m in tokens:
        calls = 64 if m <= 64 else max(4, 4096 // m)
        inputs = [
            (torch.randn(m, layer.hidden, device=DEVICE).half(), *random_routing(layer, m))
            for _ in range(min(calls, 16))
        ]
        touched = sum(len(torch.unique(index)) for _, index, _ in inputs) / len(inputs)
        with torch.no_grad():
            us = replayed(lambda i, ins=inputs: modules[i % len(modules)](*ins[i % len(ins)]), calls)
            forget_graphs()
            if m not in bf16:
                halves = [(x.bfloat16(), index, chosen.bfloat16()) for x, index, chosen in inputs]
                bf16[m] = replayed(lambda i, ins=halves: plain(*ins[i % len(ins)]), calls)
        flops = 6 * m * layer.top_k * layer.hidden * layer.inner
        yield Row(
            layer.name, str(weights), m, touched, us, touched * size / bandwidth / us * 1e6, flops / us / 1e6, bf16[m]
        )


def peers() -> dict[tuple[str, str, int], dict[str, float]]:
    """The figures of ``recorded_moe_h100.csv``: (layer, weights, m) to microseconds by implementation."""
    found: dict[tuple[str, str, int], dict[str, float]] = {}
    for row in recorded("recorded_moe_h100.csv"):
        place = found.setdefault((row["layer"], row["weights"], int(row["m"])), {})
        place[row["implementation"]] = float(row["us"])
    return found


def table(rows: list[Row]) -> str:
    """Markdown; a fraction of the bandwidth up to 64 tokens, TFLOP/s beyond."""
    others = peers()
    lines = [
        "| layer | weights | M | experts | us | of bandwidth / TFLOP/s | bf16 grouped us | bf16 / ours "
        "| fused_marlin_moe (rec.) | the same, without act-order (rec.) |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        marlin = [
            others.get((row.layer, weights, row.m), {}).get("fused_marlin_moe", "")
            for weights in (row.weights, row.weights.removesuffix(" act-order"))
        ]
        rate = f"{row.fraction:.2f}" if row.m <= 64 else f"{row.tflops:.0f} T"
        lines.append(
            f"| {row.layer} | {row.weights} | {row.m} | {row.experts_touched:.1f} | {row.us:.1f} | {rate} | "
            f"{row.bf16_us:.1f} | {row.bf16_us / row.us:.2f} | {marlin[0]} | {marlin[1]} |"
        )
    return "\n".join(lines)


def plot(rows: list[Row], path: str) -> None:
    """Time over tokens, one panel per layer: ours with act-order, bf16 grouped experts and the recorded peer."""
    import matplotlib.pyplot as plt

    others = peers()
    names = list(dict.fromkeys(row.layer for row in rows))
    figure, axes = plt.subplots(1, len(names), figsize=(5 * len(names), 4), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        mine = [row for row in rows if (row.layer, row.weights) == (name, str(MAIN))]
        axis.loglog([row.m for row in mine], [row.us for row in mine], "o-", label="graftq, act-order")
        axis.loglog([row.m for row in mine], [row.bf16_us for row in mine], "k--", label="transformers bf16 grouped")
        for weights in (str(Weights()), str(MAIN)):
            points = [
                (m, found["fused_marlin_moe"])
                for (layer, kind, m), found in others.items()
                if (layer, kind) == (name, weights) and "fused_marlin_moe" in found
            ]
            if points:
                axis.loglog(*zip(*points, strict=True), ":", label=f"fused_marlin_moe {weights} (recorded)")
        axis.set(title=name, xlabel="tokens")
    axes[0][0].set_ylabel("us per call")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


_FIRST_CALL = """
import time, torch
from moe import Layer, MAIN, random_experts, random_routing
layer = Layer("small", 8, 2, 1024, 1024)
module = random_experts(layer, MAIN)
for m in (1, 16):
    inputs = (torch.randn(m, 1024, device="cuda").half(), *random_routing(layer, m))
    torch.cuda.synchronize()
    started = time.perf_counter()
    module(*inputs)
    torch.cuda.synchronize()
    print(f"{m}: {(time.perf_counter() - started) * 1e3:.0f} ms", end="; ")
"""


def report_host_time(layer: Layer, tokens: tuple[int, ...]) -> None:
    """Print what an eager call costs the host, through the module, on experts too small to keep the device busy."""
    small = Layer(layer.name, layer.experts, layer.top_k, 256, 256)
    module = random_experts(small, MAIN)
    for m in tokens:
        inputs = (torch.randn(m, small.hidden, device=DEVICE).half(), *random_routing(small, m))
        with torch.no_grad():
            us = host_microseconds(lambda inputs=inputs: module(*inputs))
        print(f"host time of an eager call, {layer.name}'s routing, M={m}: {us:.1f} us")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", help="write every row there")
    parser.add_argument("--plot", help="write a plot there")
    parser.add_argument("--layer", help="only this layer")
    parser.add_argument("--check", action="store_true", help="tiny layers, meaningless times; needs no GPU")
    options = parser.parse_args()

    rows: list[Row] = []
    if options.check:
        for weights in (MAIN, *OTHERS):
            rows += measure(TINY[0], weights, (1, 2, 3), 1.0, {})
    else:
        bandwidth, rate = read_bandwidth(), matmul_rate()
        print(f"{torch.cuda.get_device_name()}; torch {torch.__version__}, Triton {triton.__version__}")
        print(f"read {bandwidth / 1e9:.0f} GB/s; fp16 matmul of 8192 cubed {rate / 1e12:.0f} TFLOP/s")
        report_first_calls(_FIRST_CALL)
        for layer in LAYERS:
            if options.layer not in (None, layer.name):
                continue
            report_host_time(layer, (1, 16))
            bf16: dict[int, float] = {}
            rows += measure(layer, MAIN, TOKENS, bandwidth, bf16)
            for weights in OTHERS:
                rows += measure(layer, weights, FEW_TOKENS, bandwidth, bf16)
    print(table(rows))
    if options.csv:
        write_csv(rows, options.csv)
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
