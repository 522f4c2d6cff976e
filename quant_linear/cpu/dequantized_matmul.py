"""Products with dequantized weights on a CPU: a tile of output rows at a time, in a workspace of bounded size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from graftq.quant_linear.cpu.layout import bytes_of
from graftq.quant_linear.packing import unpack_codes

TILE_BYTES = 2 * 2**20
"""Dequantized weights at a time, so that they stay in the caches, unless one block of output rows needs more."""

_BATCHED_TOKENS = 256  # up to these, one batched product in bf16 beats a product for each block of outputs
_BYTES_STEP = 64  # output rows of a tile of bytes are a multiple of these


class CpuWeights(NamedTuple):
    """One projection in the operators' order of arguments: the tensors of ``CpuLayout``, then values of its spec.

    For experts, the tensors have the experts as an additional first dimension.
    """

    codes: torch.Tensor
    scales_and_zeros: torch.Tensor
    groups: torch.Tensor
    scales: torch.Tensor
    qzeros: torch.Tensor
    order: torch.Tensor | None
    bias: torch.Tensor | None
    bits: int
    sym: bool
    zero_offset: int

    def of(self, expert: int) -> CpuWeights:
        """The weights of one expert, without ``order`` and ``bias``."""
        return self._replace(
            codes=self.codes[expert],
            scales_and_zeros=self.scales_and_zeros[expert],
            groups=self.groups[expert],
            scales=self.scales[expert],
            qzeros=self.qzeros[expert],
            order=None,
            bias=None,
        )

    @property
    def rows(self) -> int:
        """Input rows as packed, of one expert."""
        if self.is_bytes:
            return self.codes.shape[-1] * self.codes.shape[-3]
        return self.codes.shape[-2] // self.halves

    @property
    def is_bytes(self) -> bool:
        """Whether the layout is ``Int8Layout``."""
        return self.codes.dtype == torch.int8

    @property
    def halves(self) -> int:
        """Nibbles per code."""
        return 2 if self.bits == 8 else 1


def multiply_tiles(placed: torch.Tensor, w: CpuWeights, n: int) -> torch.Tensor:
    """``placed`` [M, rows] by the weights, in its dtype: [M, n]."""
    out = placed.new_empty(len(placed), n)
    batched = placed.dtype == torch.bfloat16 and len(placed) <= _BATCHED_TOKENS
    copies = placed[None]
    for outputs, weights in tiles(w, n, placed.dtype):
        if batched and len(weights) > 1:
            if len(weights) > len(copies):
                copies = placed.expand(len(weights), -1, -1).contiguous()  # once, not again in each product
            found = torch.bmm(copies[: len(weights)], weights).transpose(0, 1).flatten(1)
        else:
            found = torch.cat([placed @ block for block in weights], 1)
        out[:, outputs] = found[:, : outputs.stop - outputs.start]
    return out


def multiply_tiles_transposed(grad: torch.Tensor, w: CpuWeights) -> torch.Tensor:
    """``grad`` [M, N] by the transposed weights: float32 [M, rows]."""
    wide = grad.float()
    total = wide.new_zeros(len(grad), w.rows)
    for outputs, weights in tiles(w, grad.shape[1], torch.float32):
        batch, _, columns = weights.shape
        part = torch.nn.functional.pad(wide[:, outputs], (0, batch * columns - (outputs.stop - outputs.start)))
        total += torch.bmm(part.view(len(grad), batch, columns).transpose(0, 1), weights.transpose(1, 2)).sum(0)
    return total


def tiles(w: CpuWeights, n: int, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    """Dequantized weights, a tile of output rows at a time; the next tile overwrites them.

    Yields:
        The range of outputs, and their weights, ``dtype`` [batch, rows, columns]. ``batch * columns`` may exceed the
        range; the rest is padding.
    """
    return (_byte_tiles if w.is_bytes else _nibble_tiles)(w, n, dtype)


def _nibble_tiles(w: CpuWeights, n: int, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    rows, units, block = w.rows, len(w.groups), 2 * w.codes.shape[-1]
    blocks = -(-n // block)  # whole blocks may lie beyond: outputs that the writer padded
    step = min(blocks, max(1, TILE_BYTES // (dtype.itemsize * block * rows)))
    # Nibbles become bytes of 16 times their distance from the middle code.
    scales, offsets = _scales_and_offsets(w, n, 1.0 if w.halves == 2 else 1 / 16, dtype)
    scales = _by_block(scales, block)
    offsets = None if offsets is None else _by_block(offsets, block)
    signed, low = w.codes.new_empty(2, step, rows, block // 2, dtype=torch.int8)
    both = low.new_empty(step, rows, block)
    space = low.new_empty(step, rows, block, dtype=scales.dtype)
    for first in range(0, blocks, step):
        run = slice(first, min(first + step, blocks))
        size = run.stop - first
        if w.halves == 2:
            torch.cat(bytes_of(w.codes[run], 2), -1, out=both[:size].view(torch.uint8))
            both[:size].bitwise_xor_(-0x80)
        else:
            torch.bitwise_xor(w.codes[run].view(torch.int8), -0x78, out=signed[:size])
            torch.bitwise_left_shift(signed[:size], 4, out=low[:size])
            signed[:size].bitwise_and_(-0x10)
            torch.cat((low[:size], signed[:size]), -1, out=both[:size])
        weights = space[:size].copy_(both[:size])
        by_unit = weights.view(size, units, -1, block)
        if offsets is None:
            by_unit.mul_(scales[run])
        else:
            torch.addcmul(offsets[run], by_unit, scales[run], out=by_unit)
        yield slice(first * block, min(run.stop * block, n)), weights.to(dtype)


def _by_block(side: torch.Tensor, block: int) -> torch.Tensor:
    """[units, n] to [blocks, units, 1, block], padded."""
    padded = torch.nn.functional.pad(side, (0, -side.shape[1] % block))
    return padded.view(len(side), -1, 1, block).transpose(0, 1)


def _byte_tiles(w: CpuWeights, n: int, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    units, _, unit = w.codes.shape
    step = max(_BYTES_STEP, TILE_BYTES // (dtype.itemsize * units * unit) // _BYTES_STEP * _BYTES_STEP)
    step = min(step, n)
    scales, offsets = _scales_and_offsets(w, n, 1.0, dtype)
    wide = w.codes.new_empty(units, step, unit, dtype=scales.dtype)
    space = wide.new_empty(step, units, unit)
    for first in range(0, n, step):
        run = slice(first, min(first + step, n))
        size = run.stop - first
        codes = wide[:, :size].copy_(w.codes[:, run])
        weights = space[:size].transpose(0, 1)
        if offsets is None:
            torch.mul(codes, scales[:, run, None], out=weights)
        else:
            torch.addcmul(offsets[:, run, None], codes, scales[:, run, None], out=weights)
        yield run, space[:size].to(dtype).view(1, size, -1).transpose(1, 2)


def _scales_and_offsets(
    w: CpuWeights, n: int, factor: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What ``code - middle`` is multiplied by, times ``factor``, and what is added to that: [units, n] each.

    With symmetric zero points nothing is added (None), and the scales are in ``dtype``. Otherwise both are in float32,
    since zero points may be large.
    """
    scales, offsets, groups = w.scales[:, :n].float(), None, w.groups
    if w.sym:
        scales = (scales * factor).to(dtype)
    else:
        middle = 2 ** (w.bits - 1) - w.zero_offset
        offsets = (middle - unpack_codes(w.qzeros.T, w.bits, n).T.float()) * scales
        offsets, scales = offsets.index_select(0, groups), scales * factor
    return scales.index_select(0, groups), offsets
