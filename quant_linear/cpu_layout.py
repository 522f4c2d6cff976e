"""The arrangement of a projection that torch's int4 kernel for CPUs reads, for every code width and grouping."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from graftq.quant_linear.layouts import GptqTensors
from graftq.quant_linear.packing import pack_codes, sequential_g_idx, unpack_codes, zero_points
from graftq.quant_linear.spec import QuantSpec

UNITS = (256, 128, 64, 32)
"""Input rows per scale that the kernel knows, the fastest first."""

_CHUNK_CODES = 1 << 20  # codes repacked at a time: bounds what the load needs beside the weights themselves


@dataclass(frozen=True)
class Places:
    """Where each stored input row goes.

    Attributes:
        order: int64 [rows], the stored row at each place, beyond all of them for padding; None if nothing moves.
        groups: int64 [rows / unit], the group of each unit.
        unit: Input rows per scale, one of :data:`UNITS`.
    """

    order: torch.Tensor | None
    groups: torch.Tensor
    unit: int

    @property
    def rows(self) -> int:
        """Number of places."""
        return len(self.groups) * self.unit


@dataclass(frozen=True)
class Int4Layout:
    """Nibbles in the kernel's order, ``block`` output rows side by side.

    =================== ====================================== ======================================================
    tensor              shape                                  meaning
    =================== ====================================== ======================================================
    codes               uint8 [blocks, halves, rows, block/2]  byte i of a row: the codes of outputs i (low nibble)
                                                               and i + block/2 of the block; 8 bits: high, then low
                                                               nibbles; 2 and 3 bits are widened, around 8 as middle
    scales_and_zeros    bf16 [halves, units, blocks*block, 2]  ``w = (nibble - 8) * scale + zero``, summed over halves
    groups              int32 [units]                          row of ``scales`` of each unit
    order               int32 [rows]                           input at each place, ``in_features`` for padding;
                                                               absent if nothing moves
    scales, qzeros      as stored                              exact, for float32 and for :meth:`unpack`
    g_idx, bias         as stored, if stored
    =================== ====================================== ======================================================

    Act-order sorts the input rows by group (stable). A group that no unit divides is padded to whole units of 32.

    Attributes:
        spec: The projection.
        block: 64 or 32, what this machine's kernel wants.
    """

    spec: QuantSpec
    block: int

    @property
    def halves(self) -> int:
        """Nibbles per code."""
        return 2 if self.spec.bits == 8 else 1

    def pack(self, tensors: GptqTensors) -> dict[str, torch.Tensor]:
        """Repack.

        Args:
            tensors: One projection as stored; ``g_idx`` must be there if the spec says act-order, in range.
        """
        return self.pack_in(tensors, self.unit(tensors.g_idx))

    def pack_in(self, tensors: GptqTensors, unit: int) -> dict[str, torch.Tensor]:
        """:meth:`pack` in units of a given size, no larger than :meth:`unit`'s."""
        places = self.places(tensors.g_idx, unit, tensors.qweight.device)
        packed = {
            "codes": self._pack_codes(tensors.qweight, places),
            "scales_and_zeros": self._scales_and_zeros(tensors, places),
            "groups": places.groups.to(torch.int32),
            "scales": tensors.scales,
            "qzeros": tensors.qzeros,
        }
        if places.order is not None:
            packed["order"] = places.order.clamp(max=self.spec.in_features).to(torch.int32)
        optional = {"g_idx": tensors.g_idx, "bias": tensors.bias}
        return packed | {name: tensor for name, tensor in optional.items() if tensor is not None}

    def unpack(self, packed: Mapping[str, torch.Tensor]) -> GptqTensors:
        """Restore the checkpoint tensors bit for bit, the unused bits of the last words included."""
        codes, g_idx = packed["codes"], packed.get("g_idx")
        places = self.places(g_idx, codes.shape[2] // len(packed["groups"]), codes.device)
        return GptqTensors(
            self._unpack_codes(codes[:, :, : places.rows], places),
            packed["qzeros"],
            packed["scales"],
            g_idx,
            packed.get("bias"),
        )

    def unit(self, g_idx: torch.Tensor | None) -> int:
        """The largest unit that divides every group; the smallest if none does."""
        spec = self.spec
        if spec.num_groups == 1:
            lengths = {self._stored_rows}
        elif not spec.desc_act:
            lengths = {spec.group_size}
        else:
            lengths = set(torch.bincount(self._group(g_idx, None), minlength=spec.num_groups).tolist())
        return next((unit for unit in UNITS if not any(length % unit for length in lengths)), UNITS[-1])

    def places(self, g_idx: torch.Tensor | None, unit: int, device: torch.device) -> Places:
        """Where the input rows go, in units of ``unit`` rows.

        Args:
            g_idx: As stored; must be there if the spec says act-order.
            unit: One of :data:`UNITS`.
            device: Where to make the tensors.
        """
        spec, stored = self.spec, self._stored_rows
        if spec.num_groups == 1 or (not spec.desc_act and spec.group_size % unit == 0):
            groups = torch.arange(-(-stored // unit), device=device) * unit // spec.group_size
            return Places(None, groups.clamp(max=spec.num_groups - 1), unit)
        group = self._group(g_idx, device)
        by_group = torch.argsort(group, stable=True)
        sorted_group = group[by_group]
        counts = torch.bincount(group, minlength=spec.num_groups)
        units = (counts + unit - 1).div(unit, rounding_mode="floor")
        first = (units.cumsum(0) - units) * unit
        rank = torch.arange(len(group), device=device) - (counts.cumsum(0) - counts)[sorted_group]
        rest = torch.arange(len(group), stored, device=device)  # rows that fill up the last words
        used, filling = int(units.sum()) * unit, -(-len(rest) // unit)
        order = torch.full((used + filling * unit,), stored, device=device)
        order[first[sorted_group] + rank] = by_group
        order[used : used + len(rest)] = rest
        last = torch.full((filling,), spec.num_groups - 1, device=device)
        groups = torch.cat((torch.repeat_interleave(units), last))
        return Places(order, groups, unit)

    @property
    def _stored_rows(self) -> int:
        """Codes that a column of ``qweight`` holds once it is padded to whole blocks of 32."""
        return -(-self.spec.packed_rows // self.spec.bits) * 32

    @property
    def _blocks(self) -> int:
        return -(-self.spec.padded_out // self.block)

    def _group(self, g_idx: torch.Tensor | None, device: torch.device | None) -> torch.Tensor:
        if not self.spec.desc_act:
            return sequential_g_idx(self.spec, device).long()
        if g_idx is None:
            raise ValueError("act-order needs g_idx")
        return g_idx[: self.spec.in_features].long()

    def _chunks(self) -> list[slice]:
        step = max(1, _CHUNK_CODES // (self.block * self._stored_rows))
        return [slice(start, min(start + step, self._blocks)) for start in range(0, self._blocks, step)]

    def _pack_codes(self, qweight: torch.Tensor, places: Places) -> torch.Tensor:
        block, bits, rows = self.block, self.spec.bits, places.rows
        packed = qweight.new_zeros(self._blocks, self.halves, rows, block // 2, dtype=torch.uint8)
        order = None if places.order is None else places.order.clamp(max=self._stored_rows - 1)
        for chunk in self._chunks():
            words = qweight[:, chunk.start * block : chunk.stop * block]
            missing = (chunk.stop - chunk.start) * block - words.shape[1]
            words = torch.nn.functional.pad(words, (0, missing, 0, -len(words) % bits))
            codes = unpack_codes(words, bits, self._stored_rows) + shift_of(bits)
            for half in range(self.halves):
                nibbles = codes if self.halves == 1 else codes >> 4 if half == 0 else codes & 15
                low, high = nibbles.view(len(codes), -1, 2, block // 2).unbind(2)
                pairs = (high << 4).bitwise_or_(low)
                pairs = pairs[:rows] if order is None else pairs.index_select(0, order)
                packed[chunk, half, : len(pairs)] = pairs.transpose(0, 1)
        return packed

    def _unpack_codes(self, packed: torch.Tensor, places: Places) -> torch.Tensor:
        spec, columns = self.spec, []
        for chunk in self._chunks():
            codes = byte_codes(packed[chunk]).permute(2, 1, 0, 3).reshape(places.rows, -1) - shift_of(spec.bits)
            if places.order is not None:
                real = places.order < self._stored_rows
                stored = codes.new_empty(self._stored_rows, codes.shape[1])
                stored[places.order[real]] = codes[real]
            else:
                stored = codes[: self._stored_rows]
            columns.append(pack_codes(stored, spec.bits)[: spec.packed_rows])
        return torch.cat(columns, 1)[:, : spec.padded_out].contiguous()

    def _scales_and_zeros(self, tensors: GptqTensors, places: Places) -> torch.Tensor:
        spec = self.spec
        # Rounded first, so that the zeros fit the scale that the kernel will use.
        scales = tensors.scales[:, : spec.out_features].to(torch.bfloat16).float()
        zeros = zero_points(tensors, spec).float()
        shape = (self.halves, spec.num_groups, self._blocks * self.block, 2)
        paired = torch.zeros(shape, dtype=torch.bfloat16, device=scales.device)
        real = paired[:, :, : spec.out_features]
        if self.halves == 1:
            real[0, ..., 0], real[0, ..., 1] = scales, (2 ** (spec.bits - 1) - zeros) * scales
        else:
            zero = (16 * 8 + 8 - zeros) * scales
            real[0, ..., 0], real[0, ..., 1] = 16 * scales, zero
            real[1, ..., 0], real[1, ..., 1] = scales, zero - real[0, ..., 1].float()  # what rounding left over
        return paired.index_select(1, places.groups)


def shift_of(bits: int) -> int:
    """What is added to a code of 2 or 3 bits, so that its middle is a nibble's."""
    return 8 - 2 ** (bits - 1) if bits < 4 else 0


def byte_codes(packed: torch.Tensor) -> torch.Tensor:
    """Codes out of ``codes`` of :class:`Int4Layout`, one per byte, :func:`shift_of` still added.

    Args:
        packed: uint8 [blocks, halves, rows, block / 2].

    Returns:
        uint8 [2, blocks, rows, block / 2]: those of the first half of each block's outputs, then of the second.
    """
    if packed.shape[1] == 1:
        return torch.stack((packed[:, 0] & 15, packed[:, 0] >> 4))
    high, low = packed.unbind(1)
    return torch.stack((high << 4 | low & 15, high & 240 | low >> 4))
