"""Measurements as a table, a file and a plot, beside what other kernels were recorded to take; a choice of cells."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FEW_TOKENS = 64
"""Up to so many the weights' bytes are what takes the time, beyond it the arithmetic."""

RESULTS = Path(__file__).parent / "results"

Recorded = Mapping[tuple[str, str, str], Mapping[int, float]]
"""Microseconds by tokens, for each layer, implementation and kind of weights."""


@dataclass(frozen=True)
class Row:
    """One measurement; ``us`` per call, ``fraction`` of the read bandwidth, ``plain_us`` with unquantized weights."""

    layer: str
    weights: str
    m: int
    us: float
    fraction: float
    tflops: float
    plain_us: float


def results(name: str) -> list[dict[str, str]]:
    """The rows of a file in ``results/``; its lines that begin with # say where they come from."""
    return list(csv.DictReader(line for line in _lines(name) if not line.startswith("#")))


def head(name: str) -> str:
    """What a file in ``results/`` says of its rows: its lines that begin with #."""
    return "\n".join(line.removeprefix("# ") for line in _lines(name) if line.startswith("#"))


def _lines(name: str) -> list[str]:
    return (RESULTS / name).read_text(encoding="utf-8").splitlines()


def recorded(name: str) -> Recorded:
    """Other kernels' times out of a file in ``results/``."""
    found: dict[tuple[str, str, str], dict[int, float]] = {}
    for row in results(name):
        place = found.setdefault((row["layer"], row["implementation"], row["weights"]), {})
        place[int(row["m"])] = float(row["us"])
    return found


def table(rows: Sequence[Row], plain: str, others: Mapping[str, Callable[[Any], object]]) -> str:
    """Markdown; a fraction of the bandwidth for few tokens, TFLOP/s beyond.

    Args:
        rows: One line each.
        plain: What ran with unquantized weights.
        others: Heads of further columns, and what they say of a row.
    """
    columns: dict[str, Callable[[Any], object]] = {
        "layer": lambda row: row.layer,
        "weights": lambda row: row.weights,
        "M": lambda row: row.m,
        "us": lambda row: f"{row.us:.1f}",
        "of bandwidth / TFLOP/s": lambda row: f"{row.fraction:.2f}" if row.m <= FEW_TOKENS else f"{row.tflops:.0f} T",
        f"{plain} us": lambda row: f"{row.plain_us:.1f}",
        f"{plain} / ours": lambda row: f"{row.plain_us / row.us:.2f}",
        **others,
    }
    lines = [columns, ["---"] * len(columns), *([show(row) for show in columns.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def time_panel(axis: Any, title: str, curves: Mapping[str, Mapping[int, float]]) -> None:
    """Time per call over tokens on one pair of axes: microseconds by tokens for each name, ours first."""
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, ScalarFormatter

    styles = ("ko-", "C0s--", "C1^:", "C2v-.", "C3D:")
    for (name, times), style in zip(curves.items(), styles, strict=False):
        axis.loglog(list(times), list(times.values()), style, label=name, markersize=4)
    axis.set(title=title, xlabel="tokens at once", ylabel="time per call, microseconds")
    axis.set_xticks([1, 4, 16, 64, 256, 1024, 4096])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_minor_formatter(NullFormatter())
    for each in (axis.xaxis, axis.yaxis):
        each.set_major_formatter(ScalarFormatter())
    axis.grid(alpha=0.3)


def save_with_legend(figure: Any, axis: Any, path: str) -> None:
    """Write ``figure``, of constrained layout, with the names of the curves of ``axis`` below all panels."""
    handles, names = axis.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def plot(rows: Sequence[Row], weights: str, plain: str, peers: Recorded, path: str) -> None:
    """Time over tokens, a panel a layer: ours with ``weights``, unquantized, the peers' with act-order and without."""
    import matplotlib.pyplot as plt

    kinds = {weights, weights.removesuffix(" act-order")}
    layers = list(dict.fromkeys(row.layer for row in rows))
    size = (max(11.0, 4.2 * len(layers)), 4.2)
    figure, axes = plt.subplots(1, len(layers), figsize=size, squeeze=False, layout="constrained")
    for axis, layer in zip(axes[0], layers, strict=True):
        mine = [row for row in rows if (row.layer, row.weights) == (layer, weights)]
        curves: dict[str, Mapping[int, float]] = {
            f"graftq, {weights}": {row.m: row.us for row in mine},
            plain: {row.m: row.plain_us for row in mine},
        }
        for (where, implementation, kind), times in peers.items():
            if where == layer and kind in kinds:
                curves[f"{implementation}, {kind} (recorded)"] = times
        time_panel(axis, layer, curves)
    save_with_legend(figure, axes[0][0], path)


def write_csv(rows: Sequence[Any], path: str) -> None:
    """Dataclass instances as a table with their fields for names."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def publish(
    rows: Sequence[Row],
    options: argparse.Namespace,
    weights: str,
    plain: str,
    peers: Recorded,
    others: Mapping[str, Callable[[Any], object]],
) -> None:
    """Print the table, and write what :func:`parser_for`'s options ask for."""
    print(table(rows, plain, others))
    if options.csv:
        write_csv(rows, options.csv)
    if options.plot:
        plot(rows, weights, plain, peers, options.plot)


def parser_for(description: str | None, layers: Sequence[str], tokens: Sequence[int]) -> argparse.ArgumentParser:
    """A command's parser, with the options on which cells are measured and where the rows go."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", nargs="+", choices=layers, default=layers, help="only these")
    parser.add_argument("--tokens", nargs="+", choices=tokens, default=tokens, type=int, help="only so many")
    parser.add_argument("--csv", help="write every row there")
    parser.add_argument("--plot", help="write a plot there")
    return parser
