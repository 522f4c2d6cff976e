"""How well it went, layer by layer."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, fields

FEW = 32
"""Tokens below which an expert is listed."""


@dataclass(frozen=True)
class Row:
    """One projection, or several that were solved for side by side.

    Attributes:
        layer: Its name in the model; of experts, with the expert's number.
        tokens: Calibration tokens that it saw.
        error: Squared error relative to rounding to the nearest code.
        damp: Damping that was used.
        clipped: Share of weights outside of their grid.
    """

    layer: str
    tokens: int
    error: float
    damp: float
    clipped: float


def as_csv(rows: Sequence[Row]) -> str:
    """``quantize_report.csv``."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = [each.name for each in fields(Row)]
    writer.writerow(names)
    for row in rows:
        values = [getattr(row, name) for name in names]
        writer.writerow([f"{value:.6g}" if isinstance(value, float) else value for value in values])
    return out.getvalue()


def worst(rows: Sequence[Row], count: int = 10) -> str:
    """A table of the layers where least was won over rounding, and of experts with few tokens."""
    lines = ["error / nearest   tokens   damp   clipped   layer"]
    for row in sorted(rows, key=lambda row: -row.error)[:count]:
        lines.append(f"{row.error:15.4f} {row.tokens:8d} {row.damp:6.3g} {row.clipped:9.4f}   {row.layer}")
    few = [row.layer for row in rows if row.tokens < FEW]
    if few:
        shown = ", ".join(few[:count]) + (", ..." if len(few) > count else "")
        lines.append(f"fewer than {FEW} tokens, so they lean on what all experts saw: {shown}")
    return "\n".join(lines)
