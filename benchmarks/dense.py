"""Time of one quantised linear layer on a GPU, beside torch's fp16 matmul and what other kernels were recorded to take.

    python benchmarks/dense.py [--csv dense.csv] [--plot dense.png]

Weights are rotated so that the L2 cache is cold, calls are replayed from a CUDA graph, figures are medians. A fraction
is of the read bandwidth measured in the same run: bytes of packed codes, scales and zero points over the time.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

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

from graftq.quant_linear.spec import QuantSpec
from graftq.quant_linear.triton_provider import TritonProvider
from graftq.quant_linear.workspace import forget_graphs

SHAPES = ((4096, 28672), (8192, 8192), (14336, 4096), (4096, 6144), (4096, 4096))
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Row:
    """One measurement; ``us`` per call, ``fraction`` of the read bandwidth, ``fp16_us`` of torch's matmul."""

    k: int
    n: int
    bits: int
    group: int
    act_order: bool
    m: int
    us: float
    fraction: float
    tflops: float
    fp16_us: float


def spec_of(k: int, n: int, bits: int, group: int, act_order: bool) -> QuantSpec:
    return QuantSpec(
        bits=bits, in_features=k, out_features=n, group_size=group, num_groups=k // group, desc_act=act_order, sym=True,
        zero_offset=1, padded_in=k, padded_out=n, stored_g_idx=k if act_order else 0, stored_bias=0,
    )  # fmt: skip


def random_packed(spec: QuantSpec) -> dict[str, torch.Tensor]:
    """Weights in the kernels' layout, straight from a random source: any bits are valid codes."""
    width = 2 if spec.bits == 3 else spec.bits
    tiles, atoms = spec.out_features // 64, spec.in_features // 128

    def words(*shape: int) -> torch.Tensor:
        return torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, device="cuda")

    packed = {
        "codes": words(tiles, atoms, 512 * width),
        "scales": (torch.rand(spec.num_groups, spec.out_features, device="cuda") * 0.01 + 0.002).half(),
        "qzeros": torch.zeros(spec.num_groups, spec.packed_zero_columns, dtype=torch.int32, device="cuda"),
    }
    if spec.bits == 3:
        packed["high"] = words(tiles, atoms, 512)
    if spec.desc_act:
        packed["order"] = torch.randperm(spec.in_features, device="cuda").to(torch.int32)
    return packed


def bytes_read(packed: dict[str, torch.Tensor]) -> int:
    """What a symmetric product must read of its weights."""
    return sum(packed[name].nbytes for name in ("codes", "high", "scales") if name in packed)


def measure(spec: QuantSpec, tokens: tuple[int, ...], bandwidth: float, fp16: dict[int, float]) -> Iterator[Row]:
    """One row per number of tokens; fills ``fp16`` where it lacks one."""
    provider = TritonProvider()
    first = random_packed(spec)
    sets = [first] + [random_packed(spec) for _ in range(COLD_BYTES // bytes_read(first))]
    plain = [
        torch.randn(spec.out_features, spec.in_features, device="cuda").half()
        for _ in range(1 + COLD_BYTES // (2 * spec.in_features * spec.out_features))
    ]
    for m in tokens:
        x = torch.randn(m, spec.in_features, device="cuda").half()
        calls = 64 if m <= 64 else max(4, 4096 // m)
        us = replayed(lambda i, x=x: provider.linear(x, sets[i % len(sets)], spec), calls)
        forget_graphs()
        if m not in fp16:
            fp16[m] = replayed(lambda i, x=x: torch.mm(x, plain[i % len(plain)].T), calls)
        yield Row(
            spec.in_features, spec.out_features, spec.bits, spec.group_size, spec.desc_act, m, us,
            bytes_read(first) / bandwidth / us * 1e6, 2 * m * spec.in_features * spec.out_features / us / 1e6,
            fp16[m],
        )  # fmt: skip


def peers_of_dense() -> dict[tuple[int, int, int], dict[str, float]]:
    """The peers' figures of ``recorded_h100.csv``: (k, n, m) to microseconds by implementation."""
    peers: dict[tuple[int, int, int], dict[str, float]] = {}
    for row in recorded("recorded_h100.csv"):
        peers.setdefault((int(row["k"]), int(row["n"]), int(row["m"])), {})[row["implementation"]] = float(row["us"])
    return peers


def table(rows: list[Row]) -> str:
    """Markdown; a fraction of the bandwidth up to 64 tokens, TFLOP/s beyond."""
    peers = peers_of_dense()
    lines = [
        "| KxN | weights | M | us | of bandwidth / TFLOP/s | fp16 us | fp16 / ours | Marlin (rec.) | Machete (rec.) |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        plain = row.bits == 4 and row.group == 128 and not row.act_order
        peer = peers.get((row.k, row.n, row.m), {}) if plain else {}
        rate = f"{row.fraction:.2f}" if row.m <= 64 else f"{row.tflops:.0f} T"
        weights = f"{row.bits}-bit g{row.group}{' act-order' if row.act_order else ''}"
        lines.append(
            f"| {row.k}x{row.n} | {weights} | {row.m} | {row.us:.1f} | {rate} | {row.fp16_us:.1f} | "
            f"{row.fp16_us / row.us:.2f} | {peer.get('marlin', '')} | {peer.get('machete', '')} |"
        )
    return "\n".join(lines)


def plot(rows: list[Row], path: str) -> None:
    """Time over tokens, one panel per shape: ours, torch's fp16 and the recorded peers."""
    import matplotlib.pyplot as plt

    peers = peers_of_dense()
    figure, axes = plt.subplots(1, len(SHAPES), figsize=(4 * len(SHAPES), 4), sharey=True)
    for axis, (k, n) in zip(axes, SHAPES, strict=True):
        mine = [row for row in rows if (row.k, row.n, row.bits, row.group, row.act_order) == (k, n, 4, 128, False)]
        axis.loglog([row.m for row in mine], [row.us for row in mine], "o-", label="graftq")
        axis.loglog([row.m for row in mine], [row.fp16_us for row in mine], "k--", label="torch fp16")
        for name in ("marlin", "machete"):
            points = [(m, peers[k, n, m][name]) for m in TOKENS if (k, n, m) in peers]
            axis.loglog(*zip(*points, strict=True), ":", label=f"{name} (recorded)")
        axis.set(title=f"{k}x{n}", xlabel="tokens")
    axes[0].set_ylabel("us per call")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def eager(m: int, act_order: bool) -> float:
    """Host time of an eager call."""
    spec = spec_of(4096, 4096, 4, 128, act_order)
    packed, provider = random_packed(spec), TritonProvider()
    x = torch.randn(m, 4096, device="cuda").half()
    return host_microseconds(lambda: provider.linear(x, packed, spec))


_FIRST_CALL = """
import time, torch
from dense import random_packed, spec_of
from graftq.quant_linear.triton_provider import TritonProvider
spec = spec_of(4096, 4096, 4, 128, False)
packed, provider = random_packed(spec), TritonProvider()
provider.layout(spec)
for m in (1, 16):
    x = torch.randn(m, 4096, device="cuda").half()
    torch.cuda.synchronize()
    started = time.perf_counter()
    provider.linear(x, packed, spec)
    torch.cuda.synchronize()
    print(f"{m}: {(time.perf_counter() - started) * 1e3:.0f} ms", end="; ")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", help="write every row there")
    parser.add_argument("--plot", help="write a plot there")
    options = parser.parse_args()

    bandwidth, rate = read_bandwidth(), matmul_rate()
    print(f"{torch.cuda.get_device_name()}; torch {torch.__version__}, Triton {triton.__version__}")
    print(f"read {bandwidth / 1e9:.0f} GB/s; fp16 matmul of 8192 cubed {rate / 1e12:.0f} TFLOP/s")
    report_first_calls(_FIRST_CALL)
    for m, act_order in ((1, False), (1, True), (16, False)):
        print(f"host time of an eager call, M={m}, act-order {act_order}: {eager(m, act_order):.1f} us")
    rows: list[Row] = []
    for k, n in SHAPES:
        fp16: dict[int, float] = {}
        rows += measure(spec_of(k, n, 4, 128, False), TOKENS, bandwidth, fp16)
        rows += measure(spec_of(k, n, 4, 128, True), (1, 16, 256), bandwidth, fp16)
        for bits, group in ((2, 128), (3, 128), (8, 128), (4, 32), (4, k)):
            rows += measure(spec_of(k, n, bits, group, False), (1, 16), bandwidth, fp16)
    print(table(rows))
    if options.csv:
        write_csv(rows, options.csv)
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
