"""Which row of the experts' two stacks holds which stored column of which projection; this reads no weights.

The two forms, fused and split, are those of ``layout``. The columns of the first stack are the activation's inputs
(``[gate; up]``, or interleaved), then the columns of padding that the checkpoint stores. Those of ``down_proj``, or of
a first stack of one projection, are as stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from graftq.quant_linear.experts_spec import ExpertsSpec
from graftq.quant_linear.gpu.tiled_layout import columns_of, padded_rows
from graftq.quant_linear.row_order import NO_ROW

HALF_FRAGMENT = 8
"""In the fused form, this many rows of gate alternate with as many of up."""


@dataclass(frozen=True)
class StackRows:
    """The rows of the first stack (gate and up) and of the second (``down_proj``)."""

    spec: ExpertsSpec

    @property
    def up_names(self) -> tuple[str, ...]:
        """The projections that make the first stack."""
        return self.spec.names[:-1]

    @property
    def intermediate(self) -> int:
        """Inputs of ``down_proj``."""
        return self.spec.of("down_proj")[0].in_features

    @property
    def part_rows(self) -> int:
        """Rows from one projection to the next in the first stack's split form."""
        return padded_rows(max(self.spec.of(name)[0].padded_out for name in self.up_names))

    def columns(self, name: str, expert: int) -> torch.Tensor:
        """The column, as counted above, of each stored column of a projection: int64 [padded_out]."""
        padded_out = self.spec.of(name)[expert].padded_out
        if name == "down_proj" or len(self.up_names) == 1:
            return torch.arange(padded_out)
        inner, is_up = self.intermediate, name == "up_proj"
        inputs = torch.arange(inner)
        inputs = inputs + is_up * inner if self.spec.is_concatenated else 2 * inputs + is_up
        return torch.cat(
            [inputs, torch.arange(2 * inner, 2 * inner + padded_out - inner) + is_up * (padded_out - inner)]
        )

    def fused_columns(self, value: torch.Tensor) -> torch.Tensor:
        """The column of each row of the fused form: int32 [E, rows], :data:`NO_ROW` for padding.

        Args:
            value: int32 [E, places], the input of ``down_proj`` at each of its places.
        """
        inner, device = self.intermediate, value.device
        experts, places = value.shape
        value = value.long()
        gates = 1 + self.spec.is_gated
        total = sum(self.spec.of(name)[0].padded_out for name in self.up_names)
        extra = torch.arange(gates * inner, total, device=device)
        used = gates * places
        columns = torch.full((experts, padded_rows(used + len(extra))), NO_ROW, dtype=torch.int64, device=device)
        columns[:, used : used + len(extra)] = extra
        if not self.spec.is_gated:
            columns[:, :used] = torch.where(value < inner, value, NO_ROW)
            return columns.to(torch.int32)
        gate, up = (value, value + inner) if self.spec.is_concatenated else (2 * value, 2 * value + 1)
        pairs = columns[:, :used].unflatten(1, (-1, 2, HALF_FRAGMENT))
        for half, column in enumerate((gate, up)):
            pairs[:, :, half] = torch.where(value < inner, column, NO_ROW).unflatten(1, (-1, HALF_FRAGMENT))
        return columns.to(torch.int32)

    def fused_source(self, columns: torch.Tensor) -> torch.Tensor:
        """For each row of the fused form, its index among the stack's stored columns side by side; -1 for padding."""
        stored = torch.cat([self.columns(name, 0) for name in self.up_names])
        place = torch.empty_like(stored)
        place[stored] = torch.arange(len(stored))
        place = place.to(columns.device)
        return torch.where(columns != NO_ROW, place[columns.clamp(max=len(place) - 1).long()], -1)

    def split_source(self, name: str, device: torch.device) -> torch.Tensor:
        """For each row of a projection in the split form, its stored column; -1 for padding: int64 [rows]."""
        padded_out = self.spec.of(name)[0].padded_out
        return columns_of(padded_out, padded_rows(padded_out) if name == "down_proj" else self.part_rows, device)

    def holding(self, name: str, expert: int, columns: torch.Tensor | None, device: torch.device) -> torch.Tensor:
        """The rows that hold a projection's stored columns: int64 [padded_out].

        Args:
            name: The projection.
            expert: Its expert's number.
            columns: What :meth:`fused_columns` gave for that expert; None in split form.
            device: Where the result is made.
        """
        if name == "down_proj" or columns is None:
            first = 0 if name == "down_proj" else self.part_rows * self.up_names.index(name)
            return torch.arange(first, first + self.spec.of(name)[expert].padded_out, device=device)
        own = columns.long()
        row = own.new_empty(int((own != NO_ROW).sum()))
        real = torch.nonzero(own != NO_ROW).flatten()
        row[own[real]] = real
        return row[self.columns(name, expert).to(device)]
