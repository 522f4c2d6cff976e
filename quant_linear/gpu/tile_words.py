"""Codes as the checkpoint stores them to the words of tiles, and back: by a kernel on GPUs, by torch elsewhere.

torch's form is the reference that the kernel is held against. On a GPU it takes a thousand launches for an expert of a
Mixtral and 15 GB of memory traffic, where the kernel takes two and reads and writes what there is.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from graftq.quant_linear.gpu.devices import current
from graftq.quant_linear.packing import pack_codes, unpack_codes
from graftq.quant_linear.row_order import NO_ROW, RowOrder

TILE_N = 64
"""Output rows of an atom."""

ATOM_K = 128
"""Input rows of an atom."""

CHUNK_TILES = 32
"""Output tiles that torch repacks at a time: bounds what that needs beside the weights themselves."""


def to_tiles(qweight: torch.Tensor, bits: int, order: RowOrder, source: torch.Tensor) -> dict[str, torch.Tensor]:
    """Repack codes, on the device they are on.

    Args:
        qweight: int32 [packed_rows, columns], as stored.
        bits: Code width: 2, 3, 4 or 8.
        order: Where the input rows go; a multiple of :data:`ATOM_K` places.
        source: int64 [64 * tiles], the column of ``qweight`` for each output row, -1 for padding.

    Returns:
        ``codes``, and ``high`` for 3 bits, as :class:`graftq.quant_linear.gpu.tiled_layout.TiledLayout` describes them.
    """
    if qweight.device.type in ("cuda", "xpu"):
        return to_tiles_by_kernel(qweight, bits, order, source)
    qweight = torch.nn.functional.pad(qweight, (0, 0, 0, -len(qweight) % bits))
    chunks = []
    for columns in source.split(CHUNK_TILES * TILE_N):
        chosen = torch.where(columns >= 0, qweight[:, columns.clamp(min=0)], 0)
        codes = unpack_codes(chosen, bits, len(qweight) // bits * 32)
        chunks.append(_to_words(_place(codes, order), bits))
    return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}


def to_tiles_by_kernel(
    qweight: torch.Tensor, bits: int, order: RowOrder, source: torch.Tensor
) -> dict[str, torch.Tensor]:
    """What :func:`to_tiles` does, by Triton's kernel."""
    from graftq.quant_linear.kernels.pack import pack_kernel  # not at the top, where triton may be absent

    device, width = qweight.device, 2 if bits == 3 else bits
    tiles, atoms = len(source) // TILE_N, order.rows // ATOM_K
    places = order.order
    if places is None:
        places = torch.arange(order.rows, dtype=torch.int32, device=device)
    packed = {"codes": torch.empty(tiles, atoms, 512 * width, dtype=torch.int16, device=device)}
    if bits == 3:
        packed["high"] = torch.empty(tiles, atoms, 512, dtype=torch.int16, device=device)
    qweight = qweight.contiguous()
    with current(device):
        pack_kernel[(tiles, atoms)](
            qweight, places, source, packed["codes"], packed.get("high", packed["codes"]), *qweight.shape, bits
        )
    return _in_pairs(packed)


def from_tiles(tiles: Mapping[str, torch.Tensor], bits: int, order: RowOrder, packed_rows: int) -> torch.Tensor:
    """The inverse of :func:`to_tiles`, in the order of the tiles: int32 [packed_rows, 64 * tiles]."""
    columns, stored = [], -(-packed_rows // bits) * 32
    for start in range(0, len(tiles["codes"]), CHUNK_TILES):
        chunk = {name: tiles[name][start : start + CHUNK_TILES] for name in ("codes", "high") if name in tiles}
        placed = _from_words(chunk, bits)
        if order.order is None:
            codes = placed[:stored]
        else:
            codes = placed.new_empty(stored, placed.shape[1])
            real = order.order != NO_ROW
            codes[order.order[real].long()] = placed[real]
        columns.append(pack_codes(codes, bits)[:packed_rows])
    return torch.cat(columns, 1)


def _place(codes: torch.Tensor, order: RowOrder) -> torch.Tensor:
    """Stored rows to their places: uint8 [stored, n] to [order.rows, n], padding 0."""
    if order.order is None:
        return torch.nn.functional.pad(codes, (0, 0, 0, order.rows - len(codes)))
    return torch.where((order.order != NO_ROW)[:, None], codes[order.order.clamp(max=len(codes) - 1).long()], 0)


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
    return _in_pairs(packed)


def _from_words(packed: Mapping[str, torch.Tensor], bits: int) -> torch.Tensor:
    """The inverse of :func:`_to_words`."""
    width = 2 if bits == 3 else bits
    planes = 16 // width
    tiles, atoms, _ = packed["codes"].shape
    fragments = packed["codes"].view(torch.int16).view(tiles, atoms, -1, 4, 8, 4, 2, 2, 2)
    fragments = fragments.permute(0, 1, 3, 7, 4, 2, 6, 5, 8)
    words = fragments.reshape(tiles, atoms, TILE_N, ATOM_K // planes)
    codes = torch.stack([words >> (plane * width) & ((1 << width) - 1) for plane in range(planes)])
    if bits == 3:
        top = packed["high"].view(torch.int16).view(tiles, atoms, 4, 8, 4, 2, 2).permute(0, 1, 2, 5, 3, 4, 6)
        top = top.reshape(tiles, atoms, TILE_N, 8)
        for plane, half, bit in _top_bits():
            codes[plane, ..., 8 * half : 8 * half + 8] |= (top >> bit & 1) << 2
    return codes.to(torch.uint8).permute(2, 0, 4, 1, 3).reshape(atoms * ATOM_K, tiles * TILE_N)


def _in_pairs(packed: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same memory as int32, since NCCL has no int16."""
    return {name: tensor.view(torch.int32) for name, tensor in packed.items()}


def _top_bits() -> list[tuple[int, int, int]]:
    """(plane, half of the columns, bit) of each 3-bit code's top bit, as ``kernels.unpack`` wants them."""
    return [(plane, half, plane // 2 * 4 + 2 + plane % 2 - 2 * half) for half in range(2) for plane in range(8)]
