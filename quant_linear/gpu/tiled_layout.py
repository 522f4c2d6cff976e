"""The arrangement of a projection that the Triton kernels read: tiles in the order of the matrix instructions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from graftq.quant_linear.gpu.split_counters import reserve
from graftq.quant_linear.layouts import GptqTensors
from graftq.quant_linear.packing import pack_codes, sequential_g_idx, unpack_codes
from graftq.quant_linear.spec import QuantSpec

TILE_N = 64
"""Output rows of an atom."""

PADDED_N = 128
"""Output rows are padded to a multiple of this, the most that one program computes, so that it reads no further."""

ATOM_K = 128
"""Input rows of an atom."""

UNIT = 16
"""Input rows that share a scale where the checkpoint's own groups suit no kernel."""

NO_ROW = 2**31 - 1
"""Entry of ``order`` for a row of padding: beyond any input, so that the kernels' bounds check skips it."""

CHUNK_TILES = 32
"""Output tiles repacked at a time: bounds what the load needs beside the weights themselves."""


@dataclass(frozen=True)
class RowOrder:
    """Where each stored input row goes.

    Attributes:
        order: int32 [rows], the stored row at each place (:data:`NO_ROW` for padding), or None if nothing moves.
        unit_group: int64 [rows / UNIT], the group of each unit, or None if the groups stay as they are.
        rows: Places, a multiple of :data:`ATOM_K`.
    """

    order: torch.Tensor | None
    unit_group: torch.Tensor | None
    rows: int

    def padded(self, rows: int) -> RowOrder:
        """The same with padding up to ``rows`` places, a multiple of :data:`ATOM_K`."""
        order, unit_group = self.order, self.unit_group
        if order is not None:
            order = torch.nn.functional.pad(order, (0, rows - self.rows), value=NO_ROW)
        if unit_group is not None:
            unit_group = torch.cat([unit_group, unit_group[-1:].expand((rows - self.rows) // UNIT)])
        return RowOrder(order, unit_group, rows)


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

    A layer that others are joined to (``joint``) holds their output rows behind its own, in all tensors.

    Act-order sorts the input rows by group (stable), so that groups are contiguous; the activations are gathered
    through ``order``. A group size that no kernel knows, or groups of uneven length, are cut into units of 16 rows
    that each have their own copy of the scale, the last unit of a group padded.
    """

    spec: QuantSpec

    def group(self, scale_rows: int) -> int:
        """Input rows per row of ``scales``, as the kernels are told it: 0 for a single group.

        Args:
            scale_rows: Rows of the packed ``scales``; they tell whether :meth:`pack` regrouped.
        """
        if self.spec.num_groups == 1 and scale_rows == 1:
            return 0
        kept = scale_rows == self.spec.num_groups and _is_native(self.spec.group_size)
        return self.spec.group_size if kept else UNIT

    def pack(self, tensors: GptqTensors) -> dict[str, torch.Tensor]:
        """Repack, on the device the tensors are on.

        Args:
            tensors: One projection as stored; ``g_idx`` must be there if the spec says act-order, in range.
        """
        reserve(tensors.qweight.device)
        plan = self.plan(tensors.g_idx, tensors.qweight.device)
        tiles = -(-self.spec.padded_out // PADDED_N) * (PADDED_N // TILE_N)
        parts: list[dict[str, torch.Tensor]] = []
        for start in range(0, tiles, CHUNK_TILES):
            stop = min(start + CHUNK_TILES, tiles)
            qweight = tensors.qweight[:, start * TILE_N : stop * TILE_N]
            qweight = torch.nn.functional.pad(qweight, (0, (stop - start) * TILE_N - qweight.shape[1]))
            parts.append(self.to_tiles(qweight, plan))
        packed = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        packed["scales"], packed["qzeros"] = tensors.scales, tensors.qzeros
        if plan.unit_group is not None:
            packed["scales"] = tensors.scales[plan.unit_group]
            packed["qzeros"] = tensors.qzeros[plan.unit_group]
        optional = {"order": plan.order, "g_idx": tensors.g_idx, "bias": tensors.bias}
        return packed | {name: tensor for name, tensor in optional.items() if tensor is not None}

    def unpack(self, packed: Mapping[str, torch.Tensor]) -> GptqTensors:
        """Restore the checkpoint tensors bit for bit, the unused bits of the last words included."""
        spec = self.spec
        plan = self.plan(packed.get("g_idx"), packed["codes"].device)
        qweight = self.from_tiles(packed, plan)[:, : spec.padded_out].contiguous()
        scales = _own(packed["scales"], spec.padded_out)
        qzeros = _own(packed["qzeros"], spec.packed_zero_columns)
        bias = packed.get("bias")
        if plan.unit_group is not None:
            first = torch.searchsorted(plan.unit_group, torch.arange(spec.num_groups, device=scales.device))
            scales, qzeros = scales[first], qzeros[first]
        bias = None if bias is None else _own(bias, spec.stored_bias)
        return GptqTensors(qweight, qzeros, scales, packed.get("g_idx"), bias)

    def to_tiles(self, qweight: torch.Tensor, plan: RowOrder) -> dict[str, torch.Tensor]:
        """Whole tiles of columns of ``qweight`` [packed_rows, 64 * tiles] as ``codes``, and ``high`` for 3 bits."""
        bits = self.spec.bits
        qweight = torch.nn.functional.pad(qweight, (0, 0, 0, -len(qweight) % bits))
        return _to_words(self._place(unpack_codes(qweight, bits, self._stored_rows), plan), bits)

    def from_tiles(self, tiles: Mapping[str, torch.Tensor], plan: RowOrder) -> torch.Tensor:
        """The inverse of :meth:`to_tiles`."""
        columns = []
        for start in range(0, len(tiles["codes"]), CHUNK_TILES):
            chunk = {name: tiles[name][start : start + CHUNK_TILES] for name in ("codes", "high") if name in tiles}
            placed = _from_words(chunk, self.spec.bits)
            if plan.order is None:
                codes = placed[: self._stored_rows]
            else:
                codes = placed.new_empty(self._stored_rows, placed.shape[1])
                real = plan.order != NO_ROW
                codes[plan.order[real].long()] = placed[real]
            columns.append(pack_codes(codes, self.spec.bits)[: self.spec.packed_rows])
        return torch.cat(columns, 1)

    @property
    def _stored_rows(self) -> int:
        """Codes that a column of ``qweight`` holds once it is padded to whole blocks of 32."""
        return -(-self.spec.packed_rows // self.spec.bits) * 32

    def plan(self, g_idx: torch.Tensor | None, device: torch.device, in_units: bool = False) -> RowOrder:
        """Where the input rows go.

        Args:
            g_idx: As stored; must be there if the spec says act-order.
            device: Where to make the plan's tensors.
            in_units: Whether to cut the groups into units even if kernels know their size.
        """
        spec, stored = self.spec, self._stored_rows
        in_order = RowOrder(None, None, -(-stored // ATOM_K) * ATOM_K)
        if spec.num_groups == 1:
            return in_order
        native = _is_native(spec.group_size) and not in_units
        if not spec.desc_act:
            if native:
                return in_order
            group = sequential_g_idx(spec, device)
        else:
            if g_idx is None:
                raise ValueError("act-order needs g_idx")
            group = g_idx
        group = group.long()
        by_group = torch.argsort(group, stable=True)
        rest = torch.arange(len(group), stored, device=device)  # filling of the last words: no group, to the end
        sorted_group = group[by_group]
        even = torch.equal(sorted_group, torch.arange(len(group), device=device) // spec.group_size)
        if even and native:
            places, unit_group = torch.arange(stored, device=device), None
            rows = in_order.rows
        else:
            counts = torch.bincount(group, minlength=spec.num_groups)
            units = (counts + UNIT - 1).div(UNIT, rounding_mode="floor").clamp(min=1)  # an empty group keeps its scale
            first_place = (units.cumsum(0) - units) * UNIT
            rank = torch.arange(len(group), device=device) - (counts.cumsum(0) - counts)[sorted_group]
            used = int(units.sum()) * UNIT
            rows = -(-(used + len(rest)) // ATOM_K) * ATOM_K
            filling = torch.full(((rows - used) // UNIT,), spec.num_groups - 1, device=device)
            unit_group = torch.cat([torch.repeat_interleave(units), filling])
            places = torch.cat([first_place[sorted_group] + rank, used + torch.arange(len(rest), device=device)])
        order = torch.full((rows,), NO_ROW, dtype=torch.int32, device=device)
        order[places] = torch.cat([by_group, rest]).to(torch.int32)
        return RowOrder(order, unit_group, rows)

    def _place(self, codes: torch.Tensor, plan: RowOrder) -> torch.Tensor:
        """Stored rows to their places: uint8 [stored, n] to [plan.rows, n], padding 0."""
        if plan.order is None:
            return torch.nn.functional.pad(codes, (0, 0, 0, plan.rows - len(codes)))
        return torch.where((plan.order != NO_ROW)[:, None], codes[plan.order.clamp(max=len(codes) - 1).long()], 0)


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
