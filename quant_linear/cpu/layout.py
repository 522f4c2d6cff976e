"""The arrangements of a projection that torch's kernels for CPUs read: nibbles or bytes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from graftq.quant_linear.layouts import GptqTensors, Packed
from graftq.quant_linear.packing import pack_codes, unpack_codes, zero_points
from graftq.quant_linear.row_order import RowOrder, common_unit, order_rows, stored_rows
from graftq.quant_linear.spec import QuantSpec

_CHUNK_CODES = 1 << 20  # codes repacked at a time: bounds what the load needs beside the weights themselves


@dataclass(frozen=True)
class CpuLayout:
    """Codes and scales as a kernel of torch's wants them, and what it takes to restore the checkpoint.

    =================== ====================================== ======================================================
    tensor              shape                                  meaning
    =================== ====================================== ======================================================
    codes               by the subclass                        what the kernel reads, rows in order
    scales_and_zeros    by the subclass                        for the kernel
    groups              int32 [units]                          row of ``scales`` of each unit
    order               int32 [rows]                           input at each place, ``in_features`` for padding;
                                                               absent if nothing moves
    scales, qzeros      as stored                              exact, for float32 and for :meth:`unpack`
    g_idx, bias         as stored, if stored
    =================== ====================================== ======================================================

    Act-order sorts the input rows by group (stable). A group that no unit divides is padded to whole units of 32.

    Attributes:
        spec: The projection.
    """

    spec: QuantSpec

    UNITS: ClassVar[tuple[int, ...]]
    """Input rows per scale that the kernel knows, the fastest first."""

    OUTPUTS: ClassVar[Mapping[str, int]]
    """The dimension of outputs in the tensors that have one."""

    def pack(self, tensors: GptqTensors) -> Packed:
        """Repack; the form is the number of rows in a unit.

        Args:
            tensors: One projection as stored; ``g_idx`` must be there if the spec says act-order, in range.
        """
        return self.pack_in(tensors, self.unit(tensors.g_idx))

    def pack_in(self, tensors: GptqTensors, unit: int) -> Packed:
        """:meth:`pack` in units of a given size, no larger than :meth:`unit`'s."""
        places = self.row_order(tensors.g_idx, unit, tensors.qweight.device)
        packed = {
            "codes": self._pack_codes(tensors.qweight, places),
            "scales_and_zeros": self._scales_and_zeros(tensors, places),
            "groups": places.unit_group.to(torch.int32),
            "scales": tensors.scales,
            "qzeros": tensors.qzeros,
        }
        if places.order is not None:
            packed["order"] = places.order.clamp(max=self.spec.in_features)
        optional = {"g_idx": tensors.g_idx, "bias": tensors.bias}
        return Packed(packed | {name: tensor for name, tensor in optional.items() if tensor is not None}, unit)

    def unpack(self, packed: Packed) -> GptqTensors:
        """Restore the checkpoint tensors bit for bit, the unused bits of the last words included."""
        codes, g_idx = packed["codes"], packed.get("g_idx")
        assert isinstance(packed.form, int)
        places = self.row_order(g_idx, packed.form, codes.device)
        return GptqTensors(
            self._unpack_codes(codes, places), packed["qzeros"], packed["scales"], g_idx, packed.get("bias")
        )

    def unit(self, g_idx: torch.Tensor | None) -> int:
        """The largest unit that divides every group; the smallest if none does."""
        return common_unit(self.spec, g_idx, self.UNITS)

    def row_order(self, g_idx: torch.Tensor | None, unit: int, device: torch.device) -> RowOrder:
        """Where the input rows go, in units of ``unit`` rows; ``g_idx`` as stored, for act-order."""
        return order_rows(self.spec, g_idx, unit, device)

    def pad(self, packed: dict[str, torch.Tensor], rows: int, unit: int) -> None:
        """Give ``packed`` an ``order``, and places up to ``rows``."""
        own, pad = self.rows(packed["codes"]), torch.nn.functional.pad
        if "order" not in packed:
            in_order = torch.arange(own, dtype=torch.int32, device=packed["codes"].device)
            packed["order"] = in_order.clamp(max=self.spec.in_features)
        missing = rows - own
        self._pad_codes(packed, missing, missing // unit)
        packed["groups"] = pad(packed["groups"], (0, missing // unit))
        packed["order"] = pad(packed["order"], (0, missing), value=self.spec.in_features)

    @abstractmethod
    def rows(self, codes: torch.Tensor) -> int:
        """Places that ``codes`` has."""

    @abstractmethod
    def _pack_codes(self, qweight: torch.Tensor, places: RowOrder) -> torch.Tensor: ...

    @abstractmethod
    def _unpack_codes(self, packed: torch.Tensor, places: RowOrder) -> torch.Tensor: ...

    @abstractmethod
    def _scales_and_zeros(self, tensors: GptqTensors, places: RowOrder) -> torch.Tensor: ...

    @abstractmethod
    def _pad_codes(self, packed: dict[str, torch.Tensor], rows: int, units: int) -> None: ...

    def _stored_codes(self, qweight: torch.Tensor) -> torch.Tensor:
        """All codes of some columns of ``qweight``: uint8 [stored rows, columns]."""
        words = torch.nn.functional.pad(qweight, (0, 0, 0, -len(qweight) % self.spec.bits))
        return unpack_codes(words, self.spec.bits, stored_rows(self.spec))

    def _words(self, codes: torch.Tensor, places: RowOrder) -> torch.Tensor:
        """Codes at their places [rows, columns], back to columns of ``qweight``."""
        count = stored_rows(self.spec)
        if places.order is None:
            stored = codes[:count]
        else:
            real = places.order < count
            stored = codes.new_empty(count, codes.shape[1])
            stored[places.order[real].long()] = codes[: places.rows][real]
        return pack_codes(stored, self.spec.bits)[: self.spec.packed_rows]

    def _chunks(self, count: int, width: int) -> list[slice]:
        """Slices of ``count`` blocks of ``width`` outputs."""
        step = max(1, _CHUNK_CODES // (width * stored_rows(self.spec)))
        return [slice(start, min(start + step, count)) for start in range(0, count, step)]


@dataclass(frozen=True)
class Int4Layout(CpuLayout):
    """Nibbles in the int4 kernel's order, ``block`` output rows side by side; 2 and 3 bits are widened, 8 as middle.

    8 bits are a product of twice the length: all rows' high nibbles, then their low ones.

    =================== ====================================== ======================================================
    tensor              shape                                  meaning
    =================== ====================================== ======================================================
    codes               uint8 [blocks, halves*rows, block/2]   byte i of a row: the codes of outputs i (low nibble)
                                                               and i + block/2 of the block
    scales_and_zeros    bf16 [halves*units, blocks*block, 2]   ``w = (nibble - 8) * scale + zero``, summed over halves
    =================== ====================================== ======================================================

    Attributes:
        block: 64 or 32, what this machine's kernel wants.
    """

    block: int

    UNITS = (256, 128, 64, 32)
    OUTPUTS: ClassVar = {"codes": 0, "scales_and_zeros": 1, "scales": 1, "qzeros": 1, "bias": 0}

    @property
    def halves(self) -> int:
        """Nibbles per code."""
        return 2 if self.spec.bits == 8 else 1

    @property
    def _blocks(self) -> int:
        return -(-self.spec.padded_out // self.block)

    def rows(self, codes: torch.Tensor) -> int:
        """Places that ``codes`` has."""
        return codes.shape[1] // self.halves

    def _pack_codes(self, qweight: torch.Tensor, places: RowOrder) -> torch.Tensor:
        block, bits, count = self.block, self.spec.bits, stored_rows(self.spec)
        packed = qweight.new_zeros(self._blocks, self.halves, places.rows, block // 2, dtype=torch.uint8)
        order = None if places.order is None else places.order.clamp(max=count - 1)
        for chunk in self._chunks(self._blocks, block):
            words = qweight[:, chunk.start * block : chunk.stop * block]
            words = torch.nn.functional.pad(words, (0, (chunk.stop - chunk.start) * block - words.shape[1]))
            codes = self._stored_codes(words) + shift_of(bits)
            for half, nibbles in enumerate((codes,) if self.halves == 1 else (codes >> 4, codes & 15)):
                low, high = nibbles.view(count, -1, 2, block // 2).unbind(2)
                pairs = (high << 4).bitwise_or_(low)
                pairs = pairs[: places.rows] if order is None else pairs.index_select(0, order)
                packed[chunk, half, : len(pairs)] = pairs.transpose(0, 1)
        return packed.flatten(1, 2)

    def _unpack_codes(self, packed: torch.Tensor, places: RowOrder) -> torch.Tensor:
        columns = []
        for chunk in self._chunks(self._blocks, self.block):
            codes = torch.cat(bytes_of(packed[chunk], self.halves), -1).transpose(0, 1).flatten(1)
            columns.append(self._words(codes - shift_of(self.spec.bits), places))
        return torch.cat(columns, 1)[:, : self.spec.padded_out].contiguous()

    def _scales_and_zeros(self, tensors: GptqTensors, places: RowOrder) -> torch.Tensor:
        spec = self.spec
        scales, zeros = _rounded_scales_and_zeros(tensors, spec)
        shape = (self.halves, spec.num_groups, self._blocks * self.block, 2)
        paired = torch.zeros(shape, dtype=torch.bfloat16, device=scales.device)
        real = paired[:, :, : spec.out_features]
        if self.halves == 2:
            zeros = zeros + 8 * scales  # of the low nibbles, around their own middle
            real[1, ..., 0], real[1, ..., 1] = scales, zeros - zeros.bfloat16().float()  # what rounding left over
            scales = 16 * scales
        real[0, ..., 0], real[0, ..., 1] = scales, zeros
        return paired.index_select(1, places.unit_group).flatten(0, 1)

    def _pad_codes(self, packed: dict[str, torch.Tensor], rows: int, units: int) -> None:
        pad = torch.nn.functional.pad
        for name, dim, missing in (("codes", 1, rows), ("scales_and_zeros", 0, units)):
            halves = packed[name].unflatten(dim, (self.halves, -1))
            packed[name] = pad(halves, (0, 0) * (halves.dim() - dim - 2) + (0, missing)).flatten(dim, dim + 1)


@dataclass(frozen=True)
class Int8Layout(CpuLayout):
    """8-bit codes as torch's int8 kernel reads them: a product for each unit.

    =================== ============================ ================================================================
    tensor              shape                        meaning
    =================== ============================ ================================================================
    codes               int8 [units, outputs, unit]  codes less 128; ``outputs`` is the stored number
    scales_and_zeros    bf16 [units, 3, outputs]     ``w = code * scale + zero``, ``zero`` being the last two's sum
    =================== ============================ ================================================================
    """

    UNITS = (4096, 2048, 1024, 512, 256, 128, 64, 32)
    OUTPUTS: ClassVar = {"codes": 1, "scales_and_zeros": 2, "scales": 1, "qzeros": 1, "bias": 0}

    def rows(self, codes: torch.Tensor) -> int:
        """Places that ``codes`` has."""
        return codes.shape[0] * codes.shape[2]

    def _pack_codes(self, qweight: torch.Tensor, places: RowOrder) -> torch.Tensor:
        units, unit, columns = len(places.unit_group), places.unit, qweight.shape[1]
        packed = qweight.new_zeros(units, columns, unit, dtype=torch.int8)
        for chunk in self._chunks(columns, 1):
            codes = self._stored_codes(qweight[:, chunk]) ^ 128
            if places.order is None:
                codes = torch.nn.functional.pad(codes, (0, 0, 0, places.rows - len(codes)))
            else:
                codes = codes.index_select(0, places.order.clamp(max=len(codes) - 1))
            packed[:, chunk] = codes.view(torch.int8).view(units, unit, -1).transpose(1, 2)
        return packed

    def _unpack_codes(self, packed: torch.Tensor, places: RowOrder) -> torch.Tensor:
        columns = []
        for chunk in self._chunks(packed.shape[1], 1):
            codes = packed[:, chunk].transpose(1, 2).flatten(0, 1).view(torch.uint8) ^ 128
            columns.append(self._words(codes, places))
        return torch.cat(columns, 1).contiguous()

    def _scales_and_zeros(self, tensors: GptqTensors, places: RowOrder) -> torch.Tensor:
        spec = self.spec
        scales, zeros = _rounded_scales_and_zeros(tensors, spec)
        shape = (spec.num_groups, 3, spec.padded_out)
        paired = torch.zeros(shape, dtype=torch.bfloat16, device=scales.device)
        real = paired[:, :, : spec.out_features]
        real[:, 0], real[:, 1] = scales, zeros
        real[:, 2] = zeros - real[:, 1].float()  # what rounding left over
        return paired.index_select(0, places.unit_group)

    def _pad_codes(self, packed: dict[str, torch.Tensor], rows: int, units: int) -> None:
        pad = torch.nn.functional.pad
        packed["codes"] = pad(packed["codes"], (0, 0, 0, 0, 0, units))
        packed["scales_and_zeros"] = pad(packed["scales_and_zeros"], (0, 0, 0, 0, 0, units))


def _rounded_scales_and_zeros(tensors: GptqTensors, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales as bf16 has them, and ``(middle - zero point) * scale``: float32 [num_groups, out_features] each."""
    # Rounded first, so that the zeros fit the scale that the kernel will use.
    scales = tensors.scales[:, : spec.out_features].to(torch.bfloat16).float()
    return scales, (2 ** (spec.bits - 1) - zero_points(tensors, spec).float()) * scales


def shift_of(bits: int) -> int:
    """What is added to a code of 2 or 3 bits, so that its middle is a nibble's."""
    return 8 - 2 ** (bits - 1) if bits < 4 else 0


def bytes_of(codes: torch.Tensor, halves: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes out of ``codes`` of :class:`Int4Layout`, one per byte, :func:`shift_of` still added.

    Args:
        codes: uint8 [blocks, halves * rows, block / 2].
        halves: Nibbles per code.

    Returns:
        uint8 [blocks, rows, block / 2] twice: of the first half of each block's outputs, and of the second.
    """
    if halves == 1:
        return codes & 15, codes >> 4
    high, low = codes.chunk(2, 1)
    return high << 4 | low & 15, high & 240 | low >> 4
