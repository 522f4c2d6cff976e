"""Time of the quantized experts of one layer on a GPU, beside transformers' bf16 grouped experts and recorded kernels.

    python benchmarks/moe.py [--layer Mixtral-8x7B ...] [--tokens 1 16 ...] [--csv moe.csv] [--plot moe.png]
    TRITON_INTERPRET=1 python benchmarks/moe.py --check       # tiny layers, anywhere: does it all run, and right?

Random routing, another one for each call; layers are rotated so that the L2 cache is cold, calls replayed from a CUDA
graph, figures are medians. A fraction is of the read bandwidth measured in the same run: bytes of the packed codes and
scales of those experts that have tokens, over the time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from harness import COLD_BYTES, CallFor, calls_for, replayed, report_device, report_first_calls, report_host_time
from random_weights import DEVICE, Weights, random_tensors, spec_of
from tables import Row, parser_for, publish, recorded

from graftq.quant_linear.experts import QuantExpert, QuantExperts
from graftq.quant_linear.gpu.provider import TritonProvider
from graftq.quant_linear.gpu.split_counters import forget_graphs
from graftq.quant_linear.linear import QuantLinear
from graftq.quant_linear.packing import dequantize
from graftq.quant_linear.reference import TorchProvider
from graftq.quant_linear.selection import Request, Selection

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)


@dataclass(frozen=True)
class Layer:
    """The experts of one layer of a model."""

    name: str
    experts: int
    top_k: int
    hidden: int
    inner: int


LAYERS = (Layer("Mixtral-8x7B", 8, 2, 4096, 14336), Layer("Qwen3-30B-A3B", 128, 8, 2048, 768))
MAIN = Weights(act_order=True)
TOKENS_OF = {
    MAIN: TOKENS,
    **dict.fromkeys(
        (Weights(), Weights(group=-1), Weights(bits=3), replace(MAIN, bits=3), Weights(bits=8)), (1, 2, 4, 8, 16, 256)
    ),
}
TINY = Layer("tiny", 3, 2, 128, 128)


@dataclass(frozen=True)
class ExpertsRow(Row):
    """With the number of experts that had tokens, on average."""

    experts_touched: float


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
    module = QuantExperts(experts, _choose_triton, silu_and_multiply)
    module.bind(DEVICE, torch.float16)
    return module


def _choose_triton(request: Request) -> Selection:
    provider = TritonProvider()
    provider.prepare()
    return Selection(provider, {})


def silu_and_multiply(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def random_routing(layer: Layer, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts and weights [tokens, top_k], from zero-mean logits."""
    weights, index = torch.randn(tokens, layer.experts, device=DEVICE).softmax(-1).topk(layer.top_k)
    return index, weights / weights.sum(-1, keepdim=True)


def random_inputs(layer: Layer, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Activations [tokens, hidden] in fp16, and their routing."""
    return torch.randn(tokens, layer.hidden, device=DEVICE).half(), *random_routing(layer, tokens)


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
    """Relative error against float32 products of dequantized weights."""
    x, index, weights = random_inputs(layer, tokens)
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
    layer: Layer, weights: Weights, tokens: Sequence[int], bandwidth: float, bf16: dict[int, float]
) -> Iterator[ExpertsRow]:
    """One row per number of tokens; fills ``bf16`` where it lacks one."""
    if not tokens:
        return
    first = random_experts(layer, weights)
    for m in sorted({*tokens[:1], *tokens[-2:-1]}):
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
        calls = calls_for(m)
        inputs = [random_inputs(layer, m) for _ in range(min(calls, 16))]
        touched = sum(len(torch.unique(index)) for _, index, _ in inputs) / len(inputs)
        with torch.no_grad():
            us = replayed(lambda i, ins=inputs: modules[i % len(modules)](*ins[i % len(ins)]), calls)
            forget_graphs()
            if m not in bf16:
                halves = [(x.bfloat16(), index, chosen.bfloat16()) for x, index, chosen in inputs]
                bf16[m] = replayed(lambda i, ins=halves: plain(*ins[i % len(ins)]), calls)
        fraction = touched * size / bandwidth / us * 1e6
        flops = 6 * m * layer.top_k * layer.hidden * layer.inner
        yield ExpertsRow(layer.name, str(weights), m, us, fraction, flops / us / 1e6, bf16[m], touched)


def small_layer(like: Layer | None = None) -> CallFor:
    """Experts to be called eagerly: with the routing of another layer, too small to keep the device busy."""
    layer = replace(like, hidden=256, inner=256) if like else Layer("small", 8, 2, 1024, 1024)
    module = random_experts(layer, MAIN)
    return lambda m: partial(module, *random_inputs(layer, m))


def main() -> None:
    parser = parser_for(__doc__, [layer.name for layer in LAYERS], TOKENS)
    parser.add_argument("--check", action="store_true", help="a tiny layer, meaningless times; needs no GPU")
    options = parser.parse_args()

    rows: list[ExpertsRow] = []
    if options.check:
        for weights in TOKENS_OF:
            rows += measure(TINY, weights, (1, 2, 3), 1.0, {})
    else:
        bandwidth = report_device()
        report_first_calls("moe")
        for layer in LAYERS:
            if layer.name in options.layer:
                report_host_time(f"{layer.name}'s routing", small_layer(layer))
                bf16: dict[int, float] = {}
                for weights, tokens in TOKENS_OF.items():
                    rows += measure(layer, weights, [m for m in tokens if m in options.tokens], bandwidth, bf16)

    marlin = "fused_marlin_moe"
    peers = {key: times for key, times in recorded("experts_peers_h100.csv").items() if key[1] == marlin}

    def recorded_with(row: Row, weights: str) -> object:
        return peers.get((row.layer, marlin, weights), {}).get(row.m, "")

    others = {
        "experts": lambda row: f"{row.experts_touched:.1f}",
        f"{marlin} (rec.)": lambda row: recorded_with(row, row.weights),
        "the same, without act-order (rec.)": lambda row: recorded_with(row, row.weights.removesuffix(" act-order")),
    }
    publish(rows, options, str(MAIN), "bf16 grouped", peers, others)


if __name__ == "__main__":
    main()
