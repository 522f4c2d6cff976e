"""The arrangement of a projection that the Triton kernels read: tiles in the order of the matrix instructions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from graftq.quant_linear.gpu.split_counters import reserve
from graftq.quant_linear.gpu.tile_words import ATOM_K, from_tiles, to_tiles
from graftq.quant_linear.layouts import GptqTensors, Packed, owned
from graftq.quant_linear.packing import zero_points
from graftq.quant_linear.row_order import RowOrder, has_even_groups, order_alike
from graftq.quant_linear.spec import QuantSpec

PADDED_N = 128
"""Output rows are padded to a multiple of this, the most that one program computes, so that it reads no further."""

UNIT = 16
"""Input rows that share a scale where the checkpoint's own groups suit no kernel."""


@dataclass(frozen=True)
class TiledLayout:
    """Atoms of 64 output by 128 input rows, each 4 KB or less in the order in which the threads read it.

    ======= ================================== ====================================================================
    tensor  shape                              meaning
    ======= ================================== ====================================================================
    codes   int32 [tiles, atoms, 256 * width]  codes (3 bits: their low two); see ``kernels.unpack``
    high    int32 [tiles, atoms, 256]          3 bits only: the top bits
    scales  [groups, padded_out]               as stored; one row per :data:`UNIT` if regrouped
    zeros   int32 [groups, padded_out / 2]     zero points, offset included; likewise; if not symmetric
    order   int32 [128 * atoms]                input row at each place, only if the rows are not in their own order
    qzeros  as stored                          kept for :meth:`unpack` alone
    g_idx   as stored, if stored               likewise
    bias    as stored, if stored
    ======= ================================== ====================================================================

    Words and zero points have 16 bits, and lie two in an element (an odd number of zero points is padded by a 0): NCCL,
    which copies models from GPU to GPU, has no int16.

    A layer that others are joined to (``siblings``) holds their output rows behind its own, in all tensors.

    Act-order sorts the input rows by group (stable), so that groups are contiguous; the activations are gathered
    through ``order``. A group size that no kernel knows, or groups of uneven length, are cut into units of 16 rows
    that each have their own copy of the scale, the last unit of a group padded.
    """

    spec: QuantSpec

    def group(self, scale_rows: int) -> int:
        """Input rows per row of ``scales``, as the kernels are told it: 0 for a single group.

        Args:
            scale_rows: Rows of the packed ``scales``: all that an operator sees of whether they are in units.
        """
        if self.spec.num_groups == 1 and scale_rows == 1:
            return 0
        in_units = scale_rows != self.spec.num_groups or not _is_native(self.spec.group_size)
        return UNIT if in_units else self.spec.group_size

    def pack(self, tensors: GptqTensors) -> Packed:
        """Repack, on the device the tensors are on; the form is whether scales are stored per unit of 16 rows.

        Args:
            tensors: One projection as stored; ``g_idx`` must be there if the spec says act-order, in range.
        """
        reserve(tensors.qweight.device)
        in_units = self.needs_units(tensors.g_idx)
        order = self.row_order(tensors.g_idx, tensors.qweight.device, in_units)
        columns = self.spec.padded_out
        source = columns_of(columns, padded_rows(columns), tensors.qweight.device)
        packed = to_tiles(tensors.qweight, self.spec.bits, order, source)
        rows = order.unit_group if in_units else slice(None)
        packed["scales"] = tensors.scales[rows]
        if not self.spec.sym:
            zeros = stored_zeros(tensors, self.spec)[rows]
            packed["zeros"] = torch.nn.functional.pad(zeros, (0, columns % 2)).view(torch.int32)
        packed["qzeros"] = tensors.qzeros
        optional = {"order": order.order, "g_idx": tensors.g_idx, "bias": tensors.bias}
        return Packed(packed | {name: tensor for name, tensor in optional.items() if tensor is not None}, in_units)

    def unpack(self, packed: Packed) -> GptqTensors:
        """Restore the checkpoint tensors bit for bit, the unused bits of the last words included."""
        spec = self.spec
        order = self.row_order(packed.get("g_idx"), packed["codes"].device, bool(packed.form))
        qweight = from_tiles(packed, spec.bits, order, spec.packed_rows)[:, : spec.padded_out].contiguous()
        # Others may be joined to the layer: these are its own columns.
        scales = owned(packed["scales"][:, : spec.padded_out])
        qzeros = owned(packed["qzeros"][:, : spec.packed_zero_columns])
        bias = packed.get("bias")
        if packed.form:
            scales = scales[order.first_units(spec.num_groups)]
        bias = None if bias is None else owned(bias[: spec.stored_bias])
        return GptqTensors(qweight, qzeros, scales, packed.get("g_idx"), bias)

    def needs_units(self, g_idx: torch.Tensor | None) -> bool:
        """Whether scales have to be stored per unit: no kernel knows the group size, or groups are uneven."""
        spec = self.spec
        return spec.num_groups > 1 and not (_is_native(spec.group_size) and has_even_groups(spec, g_idx))

    def row_order(self, g_idx: torch.Tensor | None, device: torch.device, in_units: bool) -> RowOrder:
        """Where the input rows go.

        Args:
            g_idx: As stored; must be there if the spec says act-order.
            device: Where to make the tensors.
            in_units: Whether each group is padded to whole units of 16 rows.
        """
        return self.row_orders([self.spec], [g_idx], device, in_units)[0]

    @staticmethod
    def row_orders(
        specs: Sequence[QuantSpec], g_idx: Sequence[torch.Tensor | None], device: torch.device, in_units: bool
    ) -> list[RowOrder]:
        """:meth:`row_order` of projections of one size; padded to the longest."""
        unit = UNIT if in_units or specs[0].num_groups == 1 else min(specs[0].group_size, ATOM_K)
        return order_alike(specs, g_idx, unit, device, multiple=ATOM_K)


def stored_zeros(tensors: GptqTensors, spec: QuantSpec) -> torch.Tensor:
    """Zero points of all stored columns, int16 [groups, padded_out]; 0 for those that the writer padded."""
    zeros = zero_points(tensors, spec).to(torch.int16, memory_format=torch.contiguous_format)
    return torch.nn.functional.pad(zeros, (0, spec.padded_out - spec.out_features))


def _is_native(group_size: int) -> bool:
    return group_size in (16, 32, 64) or (group_size > 0 and group_size % ATOM_K == 0)


def padded_rows(rows: int) -> int:
    """``rows`` output rows, padded to a multiple of :data:`PADDED_N`."""
    return -(-rows // PADDED_N) * PADDED_N


def columns_of(padded_out: int, rows: int, device: torch.device) -> torch.Tensor:
    """The stored column of each of ``rows`` output rows, -1 for padding: int64 [rows]."""
    index = torch.arange(rows, device=device)
    return torch.where(index < padded_out, index, -1)
