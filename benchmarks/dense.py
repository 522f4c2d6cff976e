"""Time of one quantized linear layer on a GPU, beside torch's fp16 matmul and what other kernels were recorded to take.

    python benchmarks/dense.py [--layer 4096x4096 ...] [--tokens 1 16 ...] [--csv dense.csv] [--plot dense.png]

Weights are rotated so that the L2 cache is cold, calls are replayed from a CUDA graph, figures are medians. A fraction
is of the read bandwidth measured in the same run: bytes of packed codes, scales and zero points over the time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from harness import (
    COLD_BYTES,
    CallFor,
    calls_for,
    forget_graphs,
    replayed,
    report_device,
    report_first_calls,
    report_host_time,
)
from random_weights import Weights, spec_of
from tables import Row, parser_for, publish, recorded

from graftq.quant_linear.gpu.provider import TritonProvider
from graftq.quant_linear.spec import QuantSpec

SHAPES = {f"{k}x{n}": (k, n) for k, n in ((4096, 28672), (8192, 8192), (14336, 4096), (4096, 6144), (4096, 4096))}
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
MAIN = Weights()
TOKENS_OF = {
    MAIN: TOKENS,
    Weights(act_order=True): (1, 16, 256),
    **dict.fromkeys((Weights(bits=2), Weights(bits=3), Weights(bits=8), Weights(group=32), Weights(group=-1)), (1, 16)),
}


def random_packed(spec: QuantSpec) -> dict[str, torch.Tensor]:
    """Weights in the kernels' layout, straight from a random source: any bits are valid codes."""
    width = 2 if spec.bits == 3 else spec.bits
    tiles, atoms = spec.out_features // 64, spec.in_features // 128

    def words(*shape: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device="cuda")

    packed = {
        "codes": words(tiles, atoms, 256 * width),
        "scales": (torch.rand(spec.num_groups, spec.out_features, device="cuda") * 0.01 + 0.002).half(),
    }
    if spec.bits == 3:
        packed["high"] = words(tiles, atoms, 256)
    if spec.desc_act:
        packed["order"] = torch.randperm(spec.in_features, device="cuda").to(torch.int32)
    return packed


def bytes_read(packed: dict[str, torch.Tensor]) -> int:
    """What a symmetric product must read of its weights."""
    return sum(packed[name].nbytes for name in ("codes", "high", "scales") if name in packed)


def measure(
    layer: str, weights: Weights, tokens: Sequence[int], bandwidth: float, fp16: dict[int, float]
) -> Iterator[Row]:
    """One row per number of tokens; fills ``fp16`` where it lacks one."""
    if not tokens:
        return
    k, n = SHAPES[layer]
    spec, provider = spec_of(k, n, weights), TritonProvider()
    first = random_packed(spec)
    size = bytes_read(first)
    sets = [first] + [random_packed(spec) for _ in range(COLD_BYTES // size)]
    plain = [torch.randn(n, k, device="cuda").half() for _ in range(1 + COLD_BYTES // (2 * k * n))]
    for m in tokens:
        x = torch.randn(m, k, device="cuda").half()
        us = replayed(lambda i, x=x: provider.linear(x, sets[i % len(sets)], spec), calls_for(m))
        forget_graphs()
        if m not in fp16:
            fp16[m] = replayed(lambda i, x=x: torch.mm(x, plain[i % len(plain)].T), calls_for(m))
        yield Row(layer, str(weights), m, us, size / bandwidth / us * 1e6, 2 * m * k * n / us / 1e6, fp16[m])


def small_layer(act_order: bool = False) -> CallFor:
    """Of 4096 x 4096, to be called eagerly."""
    spec, provider = spec_of(4096, 4096, Weights(act_order=act_order)), TritonProvider()
    provider.prepare()
    packed = random_packed(spec)
    return lambda m: partial(provider.linear, torch.randn(m, 4096, device="cuda").half(), packed, spec)


def main() -> None:
    options = parser_for(__doc__, tuple(SHAPES), TOKENS).parse_args()
    bandwidth = report_device()
    report_first_calls("dense")
    report_host_time("4096x4096", small_layer())
    report_host_time("4096x4096 with act-order", small_layer(act_order=True), (1,))
    rows: list[Row] = []
    for layer in options.layer:
        fp16: dict[int, float] = {}
        for weights, tokens in TOKENS_OF.items():
            rows += measure(layer, weights, [m for m in tokens if m in options.tokens], bandwidth, fp16)

    peers = {key: times for key, times in recorded("linear_peers_h100.csv").items() if key[1] != "torch"}
    others = {
        f"{name} (rec.)": lambda row, name=name: peers.get((row.layer, name, row.weights), {}).get(row.m, "")
        for name in ("marlin", "machete")
    }
    publish(rows, options, str(MAIN), "torch fp16", peers, others)


if __name__ == "__main__":
    main()
