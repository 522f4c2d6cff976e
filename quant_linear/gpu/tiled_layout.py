"""The arrangement of a projection that the Triton kernels read: tiles in the order of the matrix instructions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from graftq.quant_linear.gpu.split_counters import reserve
from graftq.quant_linear.layouts import GptqTensors, Packed
from graftq.quant_linear.packing import pack_codes, unpack_codes
from graftq.quant_linear.row_order import NO_ROW, RowOrder, has_even_groups, order_rows, stored_rows
from graftq.quant_linear.spec import QuantSpec

TILE_N = 64
"""Output rows of an atom."""

PADDED_N = 128
"""Output rows are padded to a multiple of this, the most that one program computes, so that it reads no further."""

ATOM_K = 128
"""Input rows of an atom."""

UNIT = 16
"""Input rows that share a scale where the checkpoint's own groups suit no kernel."""

CHUNK_TILES = 32
"""Output tiles repacked at a time: bounds what the load needs beside the weights themselves."""


@dataclass(frozen=True)
class TiledLayout:
    """Atoms of 64 output by 128 input rows, each 4 KB or less in the order in which the threads read it.

    ======= ================================== ====================================================================
    tensor  shape                              meaning
    ======= ================================== ====================================================================
    codes   int16 [tiles, atoms, 512 * width]  codes (3 bits: their low two); see ``kernels.unpack``
    high    int16 [tiles, atoms, 512]          3 bits only: the top bits
    scales  [groups, padded_out]               as stored; one row per :data:`UNIT` if regrouped
    qzeros  int32 [groups, zero columns]       as stored; one row per unit if regrouped
    order   int32 [128 * atoms]                input row at each place, only if the rows are not in their own order
    g_idx   as stored, if stored               kept for :meth:`unpack` alone
    bias    as stored, if stored
    ======= ================================== ====================================================================

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
        tiles = -(-self.spec.padded_out // PADDED_N) * (PADDED_N // TILE_N)
        chunks: list[dict[str, torch.Tensor]] = []
        for start in range(0, tiles, CHUNK_TILES):
            stop = min(start + CHUNK_TILES, tiles)
            qweight = tensors.qweight[:, start * TILE_N : stop * TILE_N]
            qweight = torch.nn.functional.pad(qweight, (0, (stop - start) * TILE_N - qweight.shape[1]))
            chunks.append(self.to_tiles(qweight, order))
        packed = {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}
        packed["scales"], packed["qzeros"] = tensors.scales, tensors.qzeros
        if in_units:
            packed["scales"] = tensors.scales[order.unit_group]
            packed["qzeros"] = tensors.qzeros[order.unit_group]
        optional = {"order": order.order, "g_idx": tensors.g_idx, "bias": tensors.bias}
        return Packed(packed | {name: tensor for name, tensor in optional.items() if tensor is not None}, in_units)

    def unpack(self, packed: Packed) -> GptqTensors:
        """Restore the checkpoint tensors bit for bit, the unused bits of the last words included."""
        spec = self.spec
        order = self.row_order(packed.get("g_idx"), packed["codes"].device, bool(packed.form))
        qweight = self.from_tiles(packed, order)[:, : spec.padded_out].contiguous()
        scales = _own(packed["scales"], spec.padded_out)
        qzeros = _own(packed["qzeros"], spec.packed_zero_columns)
        bias = packed.get("bias")
        if packed.form:
            first = order.first_units(spec.num_groups)
            scales, qzeros = scales[first], qzeros[first]
        bias = None if bias is None else _own(bias, spec.stored_bias)
        return GptqTensors(qweight, qzeros, scales, packed.get("g_idx"), bias)

    def to_tiles(self, qweight: torch.Tensor, order: RowOrder) -> dict[str, torch.Tensor]:
        """Whole tiles of columns of ``qweight`` [packed_rows, 64 * tiles] as ``codes``, and ``high`` for 3 bits."""
        bits = self.spec.bits
        qweight = torch.nn.functional.pad(qweight, (0, 0, 0, -len(qweight) % bits))
        return _to_words(_place(unpack_codes(qweight, bits, stored_rows(self.spec)), order), bits)

    def from_tiles(self, tiles: Mapping[str, torch.Tensor], order: RowOrder) -> torch.Tensor:
        """The inverse of :meth:`to_tiles`."""
        columns, stored = [], stored_rows(self.spec)
        for start in range(0, len(tiles["codes"]), CHUNK_TILES):
            chunk = {name: tiles[name][start : start + CHUNK_TILES] for name in ("codes", "high") if name in tiles}
            placed = _from_words(chunk, self.spec.bits)
            if order.order is None:
                codes = placed[:stored]
            else:
                codes = placed.new_empty(stored, placed.shape[1])
                real = order.order != NO_ROW
                codes[order.order[real].long()] = placed[real]
            columns.append(pack_codes(codes, self.spec.bits)[: self.spec.packed_rows])
        return torch.cat(columns, 1)

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
        unit = UNIT if in_units or self.spec.num_groups == 1 else min(self.spec.group_size, ATOM_K)
        return order_rows(self.spec, g_idx, unit, device, multiple=ATOM_K)


def _place(codes: torch.Tensor, order: RowOrder) -> torch.Tensor:
    """Stored rows to their places: uint8 [stored, n] to [order.rows, n], padding 0."""
    if order.order is None:
        return torch.nn.functional.pad(codes, (0, 0, 0, order.rows - len(codes)))
    return torch.where((order.order != NO_ROW)[:, None], codes[order.order.clamp(max=len(codes) - 1).long()], 0)


def _own(tensor: torch.Tensor, width: int) -> torch.Tensor:
    """A layer's own columns, in memory of their own, where others are joined to it."""
    own = tensor[..., :width]
    is_whole = own.untyped_storage().nbytes() == own.nbytes
    return own if is_whole else own.clone(memory_format=torch.contiguous_format)


def _is_native(group_size: int) -> bool:
    return group_size in (16, 32, 64) or (group_size > 0 and group_size % ATOM_K == 0)


def _to_words(codes: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
    """uint8 [128 * atoms, 64 * tiles] to the words of :class:`TiledLayout`."""
    width = 2 if bits == 3 else bits
    planes = 16 // width
    atoms, tiles = codes.shape[0] // ATOM_K, codes.shape[1] // TILE_N
    by_plane = codes.view(atoms, planes, ATOM_K // planes, tiles, TILE_N).permute(1, 3, 0, 4, 2)
    words = torch.zeros(by_plane.shape[1:], dtype=torch.int32, device=codes.device)
    for plane in range(planes):
        words |= (by_plane[plane].to(torch.int32) & ((1 << width) - 1)) << (plane * width)
    fragments = words.to(torch.int16).view(tiles, atoms, 4, 2, 8, -1, 2, 4, 2).permute(0, 1, 5, 2, 4, 7, 6, 3, 8)
    packed = {"codes": fragments.reshape(tiles, atoms, 512 * width)}
    if bits == 3:
        top = torch.zeros(tiles, atoms, TILE_N, 8, dtype=torch.int32, device=codes.device)
        for plane, half, bit in _top_bits():
            top |= (by_plane[plane].to(torch.int32)[..., 8 * half : 8 * half + 8] >> 2) << bit
        fragments = top.to(torch.int16).view(tiles, atoms, 4, 2, 8, 4, 2).permute(0, 1, 2, 4, 5, 3, 6)
        packed["high"] = fragments.reshape(tiles, atoms, 512)
    return packed


def _from_words(packed: Mapping[str, torch.Tensor], bits: int) -> torch.Tensor:
    """The inverse of :func:`_to_words`."""
    width = 2 if bits == 3 else bits
    planes = 16 // width
    tiles, atoms, _ = packed["codes"].shape
    fragments = packed["codes"].view(tiles, atoms, -1, 4, 8, 4, 2, 2, 2).permute(0, 1, 3, 7, 4, 2, 6, 5, 8)
    words = fragments.reshape(tiles, atoms, TILE_N, ATOM_K // planes)
    codes = torch.stack([words >> (plane * width) & ((1 << width) - 1) for plane in range(planes)])
    if bits == 3:
        top = packed["high"].view(tiles, atoms, 4, 8, 4, 2, 2).permute(0, 1, 2, 5, 3, 4, 6)
        top = top.reshape(tiles, atoms, TILE_N, 8)
        for plane, half, bit in _top_bits():
            codes[plane, ..., 8 * half : 8 * half + 8] |= (top >> bit & 1) << 2
    return codes.to(torch.uint8).permute(2, 0, 4, 1, 3).reshape(atoms * ATOM_K, tiles * TILE_N)


def _top_bits() -> list[tuple[int, int, int]]:
    """(plane, half of the columns, bit) of each 3-bit code's top bit, as ``kernels.unpack`` wants them."""
    return [(plane, half, plane // 2 * 4 + 2 + plane % 2 - 2 * half) for half in range(2) for plane in range(8)]
