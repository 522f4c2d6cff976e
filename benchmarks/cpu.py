"""Time of quantized layers and experts on a CPU, beside bf16 layers and a plain read of the packed bytes.

    python benchmarks/cpu.py [--only dense|experts] [--csv cpu.csv]

Weights are rotated so that the caches are cold. A time is the lower quartile of the calls: other programs on the
machine only ever add to it. The roof is the time that reading the packed bytes takes at the bandwidth measured in the
same run. ``ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2`` shows an older machine. GPTQModel's kernel runs beside
where it is installed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from random_weights import Weights, spec_of
from tables import write_csv
from torch.nn import functional

from graftq.quant_linear.activations import Activation
from graftq.quant_linear.cpu.provider import CpuProvider
from graftq.quant_linear.experts import QuantExpert, QuantExperts
from graftq.quant_linear.layouts import GptqTensors
from graftq.quant_linear.linear import QuantLinear
from graftq.quant_linear.selection import Selection
from graftq.quant_linear.spec import QuantSpec

DENSE = ((4096, 4096), (4096, 14336))
EXPERTS = {"Mixtral": (8, 2, 4096, 14336), "Qwen3-30B-A3B": (128, 8, 2048, 768)}  # experts, top-k, hidden, inner
WEIGHTS = ((4, 128, True), (4, -1, False), (3, 128, True), (8, 128, True))  # bits, group, act-order
TOKENS = (1, 8, 128)
COLD_BYTES = 160 * 2**20

Routed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Activations, chosen experts and their weights."""


@dataclass(frozen=True)
class Row:
    """One measurement: ``ms`` per call, ``roof_ms`` of a plain read, ``bf16_ms`` of the unquantized layer."""

    layer: str
    weights: str
    m: int
    ms: float
    roof_ms: float
    bf16_ms: float
    gptqmodel_ms: float | None


def timed(call: Callable[[int], object], m: int) -> float:
    """Lower quartile of the milliseconds of ``call(i)``, warm."""
    call(0)
    times = []
    for i in range(7 if m > 8 else 25):
        started = time.perf_counter()
        call(i + 1)
        times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 4] * 1e3


def read_bandwidth() -> float:
    """Bytes per second of a sum over 256 MB."""
    data = torch.ones(2**26)
    return data.nbytes / timed(lambda _: torch.sum(data), 128) * 1e3


def random_tensors(k: int, n: int, bits: int, group: int, act_order: bool) -> tuple[QuantSpec, GptqTensors]:
    """A symmetric projection: any bits are valid codes."""
    spec = spec_of(k, n, Weights(bits, group, act_order))
    groups = spec.num_groups
    qweight = torch.randint(-(2**31), 2**31 - 1, (spec.packed_rows, n), dtype=torch.int32)
    scales = (torch.rand(groups, n) * 0.01 + 0.002).half()
    g_idx = (torch.randperm(k) // spec.group_size).to(torch.int32) if act_order else None
    return spec, GptqTensors(qweight, torch.zeros(groups, spec.packed_zero_columns, dtype=torch.int32), scales, g_idx)


def bytes_read(packed: dict[str, torch.Tensor]) -> int:
    """What a product reads of its weights."""
    return sum(packed[name].nbytes for name in ("codes", "scales_and_zeros"))


def copies(packed: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """As many as no cache holds."""
    count = 2 + COLD_BYTES // bytes_read(packed)
    return [{name: tensor.clone() for name, tensor in packed.items()} for _ in range(count)]


def plain_layer_times(k: int, n: int, inputs: dict[int, torch.Tensor]) -> dict[int, float]:
    first = torch.randn(n, k, dtype=torch.bfloat16)
    layers = [first.clone() for _ in range(2 + COLD_BYTES // first.nbytes)]
    return {m: timed(lambda i, x=x: functional.linear(x, layers[i % len(layers)]), m) for m, x in inputs.items()}


def label(bits: int, group: int, act_order: bool) -> str:
    return f"{bits}-bit g{group}{' act-order' if act_order else ''}"


def dense(bandwidth: float) -> Iterator[Row]:
    provider = CpuProvider()
    for k, n in DENSE:
        inputs = {m: torch.randn(m, k, dtype=torch.bfloat16) for m in TOKENS}
        bf16 = plain_layer_times(k, n, inputs)
        for bits, group, act_order in WEIGHTS:
            spec, tensors = random_tensors(k, n, bits, group, act_order)
            peer = gptqmodel_layers(spec, tensors)
            sets = copies(provider.layout(spec).pack(tensors))
            for m, x in inputs.items():
                ms = timed(lambda i, x=x, sets=sets, spec=spec: provider.linear(x, sets[i % len(sets)], spec), m)
                theirs = timed(lambda i, x=x, peer=peer: peer[i % len(peer)](x), m) if peer else None
                roof = bytes_read(sets[0]) / bandwidth * 1e3
                yield Row(f"{k}x{n}", label(bits, group, act_order), m, ms, roof, bf16[m], theirs)


def gptqmodel_kernel(spec: QuantSpec) -> type | None:
    """GPTQModel's fastest kernel for CPUs that computes bf16 layers; None where it has none, or is not installed.

    Its AVX-512 kernel is compiled at the first use, by the compiler that it wants for that. Its 8-bit kernel rounds the
    weights anew, to one scale a row. For 3 bits, and 4 without groups, it dequantizes at each call.
    """
    try:
        from gptqmodel.nn_modules.qlinear.torch_aten_kernel import TorchAtenLinear  # type: ignore[import-not-found]
        from gptqmodel.nn_modules.qlinear.torch_cpu_avx512 import TorchCpuAvx512Linear  # type: ignore[import-not-found]
        from gptqmodel.nn_modules.qlinear.torch_int8 import TorchInt8Linear  # type: ignore[import-not-found]
    except ImportError:
        return None
    if spec.bits == 8:
        return TorchInt8Linear
    if spec.bits != 4 or spec.num_groups == 1:
        return None
    is_wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return TorchCpuAvx512Linear if is_wide and TorchCpuAvx512Linear.validate_once()[0] else TorchAtenLinear


def gptqmodel_layers(spec: QuantSpec, tensors: GptqTensors) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    """Layers of :func:`gptqmodel_kernel`, as many as no cache holds."""
    kernel = gptqmodel_kernel(spec)
    if kernel is None:
        return []
    layers = []
    for _ in range(2 + COLD_BYTES // tensors.qweight.nbytes):
        layer = kernel(
            bits=spec.bits, group_size=spec.group_size, sym=True, desc_act=spec.desc_act, bias=False,
            in_features=spec.in_features, out_features=spec.out_features,
        )  # fmt: skip
        layer.qweight, layer.qzeros = tensors.qweight.clone(), tensors.qzeros.clone()
        layer.scales = tensors.scales.to(torch.bfloat16)
        g_idx = torch.arange(spec.in_features, dtype=torch.int32) // spec.group_size
        layer.g_idx = g_idx if tensors.g_idx is None else tensors.g_idx
        layer.post_init()
        layers.append(layer.eval())
        layer(torch.zeros(1, spec.in_features, dtype=torch.bfloat16))  # which may rearrange the weights only now
    return layers


def experts_module(count: int, hidden: int, inner: int, bits: int, group: int, act_order: bool) -> QuantExperts:
    """All experts have the same values, in memory of their own."""
    provider = CpuProvider()
    shapes = {"gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden)}
    made = {name: random_tensors(*shape, bits, group, act_order) for name, shape in shapes.items()}
    (spec, gate), (_, up) = made["gate_proj"], made["up_proj"]
    made["gate_proj"] = (spec, replace(gate, g_idx=up.g_idx))  # as in checkpoints, whose gate and up share it

    def layer(name: str) -> QuantLinear:
        return QuantLinear.from_tensors(*made[name], lambda request: Selection(CpuProvider(), {}), torch.bfloat16)

    module = QuantExperts(
        [QuantExpert({name: layer(name) for name in shapes}) for _ in range(count)],
        lambda request: Selection(provider, {}),
        lambda x: Activation("silu")(*x.chunk(2, dim=-1)),
    )
    module.bind("cpu", torch.bfloat16)
    return module


def plain_experts(
    up: torch.Tensor, down: torch.Tensor, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """A layer of bf16 experts, one after the other, as transformers runs it."""
    total = torch.zeros_like(x)
    for expert in index.unique().tolist():
        token, slot = torch.where(index == expert)
        gate, value = functional.linear(x[token], up[expert]).chunk(2, dim=-1)
        out = functional.linear(functional.silu(gate) * value, down[expert])
        total.index_add_(0, token, out * weights[token, slot, None])
    return total


def plain_experts_times(count: int, hidden: int, inner: int, inputs: dict[int, list[Routed]]) -> dict[int, float]:
    up = torch.randn(1, 2 * inner, hidden, dtype=torch.bfloat16).repeat(count, 1, 1)
    down = torch.randn(1, hidden, inner, dtype=torch.bfloat16).repeat(count, 1, 1)
    return {
        m: timed(lambda i, calls=calls: plain_experts(up, down, *calls[i % len(calls)]), m)
        for m, calls in inputs.items()
    }


def experts(bandwidth: float) -> Iterator[Row]:
    for name, (count, top_k, hidden, inner) in EXPERTS.items():
        inputs = {}
        for m in TOKENS:
            routes = [torch.rand(m, count).topk(top_k, dim=-1) for _ in range(26)]
            weights = [(values / values.sum(-1, keepdim=True)).to(torch.bfloat16) for values, _ in routes]
            x = torch.randn(m, hidden, dtype=torch.bfloat16)
            inputs[m] = [(x, index, value) for (_, index), value in zip(routes, weights, strict=True)]
        bf16 = plain_experts_times(count, hidden, inner, inputs)
        for bits, group, act_order in WEIGHTS:
            module = experts_module(count, hidden, inner, bits, group, act_order)
            every = sum(
                tensor.nbytes for key, tensor in module.packed().items() if key.endswith(("_codes", "_and_zeros"))
            )
            for m, calls in inputs.items():
                ms = timed(lambda i, calls=calls, module=module: module(*calls[i % len(calls)]), m)
                chosen = sum(len(index.unique()) for _, index, _ in calls) / len(calls)
                roof = every / count * chosen / bandwidth * 1e3
                yield Row(name, label(bits, group, act_order), m, ms, roof, bf16[m], None)


def table(rows: Iterable[Row]) -> str:
    """Markdown: times, and each as a ratio."""
    lines = [
        "| layer | weights | M | ms | of the roof | bf16 ms | bf16 / ours | GPTQModel ms |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        theirs = "" if row.gptqmodel_ms is None else f"{row.gptqmodel_ms:.2f}"
        lines.append(
            f"| {row.layer} | {row.weights} | {row.m} | {row.ms:.2f} | {row.roof_ms / row.ms:.2f} | "
            f"{row.bf16_ms:.2f} | {row.bf16_ms / row.ms:.2f} | {theirs} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("dense", "experts"), help="measure one half")
    parser.add_argument("--csv", help="write every row there")
    options = parser.parse_args()

    bandwidth = read_bandwidth()
    capability, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    print(f"torch {torch.__version__}, {capability}, {threads} threads; read {bandwidth / 1e9:.1f} GB/s")
    rows: list[Row] = []
    with torch.inference_mode():
        if options.only != "experts":
            rows += dense(bandwidth)
        if options.only != "dense":
            rows += experts(bandwidth)
    print(table(rows))
    if options.csv:
        write_csv(rows, options.csv)


if __name__ == "__main__":
    main()
