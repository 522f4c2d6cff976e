"""The plots of the README, of docs/performance.md and of docs/making.md, from the recorded rows in ``results/``.

python benchmarks/plots.py                        # needs matplotlib, no GPU
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from tables import head, recorded, results, save_with_legend, time_panel

DOCS = Path(__file__).parents[1] / "docs"
LAYERS = ("4096x28672", "8192x8192", "14336x4096", "4096x6144", "4096x4096")
EXPERTS = ("Mixtral-8x7B", "Qwen3-30B-A3B")
GRAFTQ, PEER, PLAIN = "#1b6ca8", "#b9b9b9", "#d9a441"
H100_SERVERS = (
    (
        "vLLM with graftq,\nact-order",
        GRAFTQ,
        {"engine": "vLLM 0.30.0", "mode": "compiled", "weights": "graftq", "act_order": "yes", "gpus": "1"},
    ),
    (
        "vLLM alone (Marlin),\nno act-order",
        PEER,
        {"engine": "vLLM 0.30.0", "mode": "compiled", "weights": "vLLM's Marlin", "act_order": "no", "gpus": "1"},
    ),
    (
        "transformers with graftq,\nact-order",
        PLAIN,
        {"engine": "transformers", "mode": "static cache", "weights": "graftq", "act_order": "yes", "gpus": "1"},
    ),
)
"""What a bar is called, its color, and what the columns of its row begin with; the first such row is the newest."""
H200_SERVERS = tuple(
    (f"{gpus} GPU{'s' * (gpus > 1)}: {name}", color, {"weights": weights, "act_order": act_order, "gpus": str(gpus)})
    for gpus in (1, 2)
    for name, color, weights, act_order in (
        ("vLLM with graftq,\nact-order", GRAFTQ, "graftq", "1"),
        ("vLLM alone (Marlin),\nno act-order", PEER, "Marlin", "0"),
    )
)


def ours(name: str, layer: str, weights: str, kind: str) -> dict[int, float]:
    """Microseconds by tokens: column ``kind`` of the rows that have one."""
    rows = [row for row in results(name) if (row["layer"], row["weights"]) == (layer, weights)]
    return {int(row["m"]): float(row[kind]) for row in rows if row[kind]}


def linear_panel(axis: Any, layer: str) -> None:
    weights, peers = "4-bit g128", recorded("linear_peers_h100.csv")
    curves = {
        "graftq": ours("linear_h100.csv", layer, weights, "us"),
        "Marlin": peers[layer, "marlin", weights],
        "Machete": peers[layer, "machete", weights],
        "torch fp16": ours("linear_h100.csv", layer, weights, "plain_us"),
    }
    time_panel(axis, "linear layer, {} inputs, {} outputs".format(*layer.split("x")), curves)


def experts_panel(axis: Any, layer: str) -> None:
    weights, peers = "4-bit g128 act-order", recorded("experts_peers_h100.csv")
    curves = {
        "graftq, act-order": ours("experts_h100.csv", layer, weights, "us"),
        "vLLM's Marlin, no act-order": peers[layer, "fused_marlin_moe", "4-bit g128"],
        "vLLM's Marlin, act-order": peers[layer, "fused_marlin_moe", weights],
        "transformers, bf16 weights": ours("experts_h100.csv", layer, weights, "plain_us"),
    }
    time_panel(axis, f"all experts of one layer, {layer}", curves)


def decode_panel(
    axis: Any, name: str, servers: tuple[tuple[str, str, dict[str, str]], ...], column: str, sequences: int
) -> None:
    """A bar for each of the ``servers`` from the rows of ``name`` whose ``column`` says so many sequences."""
    rows = [row for row in results(name) if row[column] == str(sequences)]
    bars = []
    for title, color, wanted in servers:
        same = (row for row in rows if all(row[key].startswith(value) for key, value in wanted.items()))
        bars.append((title, color, float(next(same, {}).get("tokens_per_second", 0.0))))
    most = max(value for _, _, value in bars)
    for place, (_, color, value) in enumerate(bars):
        axis.barh(place, value, color=color)
        axis.text(value + most / 50, place, f"{value:.0f}" if value else "not measured", va="center", fontsize=9)
    axis.set_yticks(range(len(bars)), [name for name, _, _ in bars], fontsize=9)
    axis.invert_yaxis()
    axis.set(
        title=f"decoding {sequences} sequence{'s' * (sequences > 1)}", xlabel="tokens per second", xlim=(0, most * 1.2)
    )
    axis.spines[["top", "right"]].set_visible(False)


def write_panels(name: str, layers: tuple[str, ...], panel: Callable[[Any, str], None], rows: int = 1) -> None:
    columns = -(-len(layers) // rows)
    size = (4.8 * max(columns, 2), 3.9 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis, layer in zip(axes.flat, layers, strict=False):
        panel(axis, layer)
    for axis in axes.flat[len(layers) :]:
        axis.set_axis_off()
    save_with_legend(figure, axes[0][0], str(DOCS / name))


def write_overview(name: str) -> None:
    figure = plt.figure(figsize=(13, 7.6), layout="constrained")
    grid = figure.add_gridspec(2, 6)
    for place, sequences in enumerate((1, 8, 32)):
        axis = figure.add_subplot(grid[0, 2 * place : 2 * place + 2])
        decode_panel(axis, "engine_h100.csv", H100_SERVERS, "sequences", sequences)
        if place:
            axis.set_yticklabels([])
    for place, (panel, layer) in enumerate(((linear_panel, LAYERS[0]), (experts_panel, EXPERTS[0]))):
        axis = figure.add_subplot(grid[1, 3 * place : 3 * place + 3])
        panel(axis, layer)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2, frameon=False, fontsize=9)
    figure.savefig(DOCS / name, dpi=110)


def write_engine(name: str, rows: str, device: str) -> None:
    """vLLM's whole engine with graftq and alone; the versions are those that the first lines of ``rows`` give."""
    sizes = list(dict.fromkeys(int(row["batch"]) for row in results(rows)))
    versions = dict.fromkeys(re.findall(r"(?:vLLM|torch|Triton) \d[\w.+]*", head(rows)))
    figure, axes = plt.subplots(1, len(sizes), figsize=(13, 3.6), layout="constrained")
    for place, (axis, sequences) in enumerate(zip(axes, sizes, strict=True)):
        decode_panel(axis, rows, H200_SERVERS, "batch", sequences)
        if place:
            axis.set_yticklabels([])
    figure.suptitle(f"Mixtral-8x7B, 4-bit, group 128, fp16, on {device}: {', '.join(versions)}", fontsize=11)
    figure.savefig(DOCS / name, dpi=110)


def write_quality(name: str) -> None:
    """Distance to the float model over size, a panel for each model and a curve for each maker of checkpoints."""
    rows = results("making.csv")
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = plt.subplots(1, len(models), figsize=(6.4 * len(models), 4.2), layout="constrained")
    for axis, model in zip(axes, models, strict=True):
        quality_panel(axis, model, [row for row in rows if row["model"] == model])
    axes[0].set(ylabel="KL to the float model, nats per token")
    figure.savefig(DOCS / name, dpi=110)


def quality_panel(axis: Any, model: str, rows: list[dict[str, str]]) -> None:
    makers = dict.fromkeys(row["maker"] for row in rows)
    for maker, color in zip(makers, (*(PEER, PLAIN)[: len(makers) - 1], GRAFTQ), strict=True):
        own = sorted((float(row["bits_per_weight"]), float(row["kl"])) for row in rows if row["maker"] == maker)
        axis.plot(*zip(*own, strict=True), "o-", color=color, label=maker)
    for row in rows:
        group, place = f"g{row['group']}", {"textcoords": "offset points", "xytext": (6, -4), "fontsize": 8}
        if row["group"] == "-1":
            group, place = "one group", {**place, "xytext": (-6, -8), "ha": "right"}
        if row["maker"] == "graftq":
            axis.annotate(f"{row['bits']} bits, {group}", (float(row["bits_per_weight"]), float(row["kl"])), **place)
    widest = max(float(row["bits_per_weight"]) for row in rows)
    axis.set(yscale="log", xlabel="bits per weight, scales and zero points included", xlim=(1.5, widest + 1))
    axis.set(title=f"{model}: nearer to the float model is lower")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)


def main() -> None:
    write_quality("making.png")
    write_panels("linear_h100.png", LAYERS, linear_panel, rows=2)
    write_panels("experts_h100.png", EXPERTS, experts_panel)
    write_overview("results_h100.png")
    write_engine("engine_h200.png", "engine_h200.csv", "H200")


if __name__ == "__main__":
    main()
