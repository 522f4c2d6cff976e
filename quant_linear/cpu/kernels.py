"""Which of torch's kernels multiply on this CPU, and the products by the packed weights as they are."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from graftq.quant_linear.cpu.dequantized_matmul import CpuWeights, multiply_tiles
from graftq.quant_linear.cpu.layout import Int8Layout
from graftq.quant_linear.spec import QuantSpec

_FEW_TOKENS = {
    torch.bfloat16: {"one nibble": 40, "two nibbles": 32, "bytes": 12},
    torch.float32: {"one nibble": 48, "two nibbles": 20, "bytes": 20},
}
"""The most tokens for which the kernels beat tiles, by the dtype of tiles and what a code is stored as."""

_LEAST_BYTES: dict[int | None, int] = {64: 2**24, 32: 3 * 2**17}
"""From so many weights of a unit on, 8-bit codes are stored as bytes; by the int4 kernel's block (64 with AVX-512)."""


@lru_cache(maxsize=1)
def int4_block() -> int | None:
    """Output rows that torch's int4 kernel packs side by side on this machine; None if it cannot be used.

    A small product finds out: the order of the nibbles depends on the instruction set, and the kernel on
    torch's version.
    """
    try:
        pack, multiply = torch.ops.aten._convert_weight_to_int4pack_for_cpu, torch.ops.aten._weight_int4pack_mm_for_cpu
        codes = (torch.arange(128 * 64, device="cpu") * 7 // 3 % 16).view(128, 64).to(torch.int32)
        packed = pack(codes, 1)
        for block in (64, 32):
            low, high = codes.view(-1, 2, block // 2, 64).permute(1, 0, 3, 2)
            if packed.flatten().equal((high << 4 | low).to(torch.uint8).flatten()):
                x = torch.eye(64, device="cpu", dtype=torch.bfloat16)[:5] * 2
                scales_and_zeros = torch.tensor([0.5, 3.0], device="cpu", dtype=torch.bfloat16).expand(2, 128, 2)
                found = multiply(x, packed, 32, scales_and_zeros.contiguous())
                return block if found.float().equal((codes.T[:5] - 8.0) + 6) else None
    except (AttributeError, RuntimeError, NotImplementedError):
        pass
    return None


@lru_cache(maxsize=1)
def has_int8_kernel() -> bool:
    """Whether torch's int8 kernel can be used on this machine; a small product finds out."""
    try:
        codes = (torch.arange(24 * 32, device="cpu") % 251 - 128).view(24, 32).to(torch.int8)
        x = torch.eye(32, device="cpu", dtype=torch.bfloat16)[:5] * 2
        scales = torch.full((24,), 0.5, device="cpu", dtype=torch.bfloat16)
        found = torch.ops.aten._weight_int8pack_mm(x, codes, scales)
        return found.float().equal(codes.T[:5].float())
    except (AttributeError, RuntimeError, NotImplementedError):
        return False


@lru_cache(maxsize=1)
def fast_dtype() -> torch.dtype:
    """The dtype that tiles of bf16 and fp16 models are multiplied in: without AVX-512, bf16 is slower than float32."""
    capability = torch.backends.cpu.get_cpu_capability()
    fast = capability.startswith("AVX512") and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def takes_bytes(spec: QuantSpec) -> bool:
    """Whether 8-bit codes are best stored as bytes, multiplied unit by unit, rather than as nibbles in one product.

    A unit must be large enough to be worth a call of its own; the faster nibbles are, the larger.
    """
    work = spec.out_features * min(spec.group_size, Int8Layout.UNITS[0])
    return spec.bits == 8 and work >= _LEAST_BYTES.get(int4_block(), 0)


def most_tokens(w: CpuWeights, dtype: torch.dtype) -> int:
    """The most rows of ``dtype`` that a kernel is used for; -1 if there is no such kernel."""
    if dtype == torch.float32 or not (has_int8_kernel() if w.is_bytes else int4_block()):
        return -1
    return _FEW_TOKENS[fast_dtype()]["bytes" if w.is_bytes else "two nibbles" if w.halves == 2 else "one nibble"]


def multiply(placed: torch.Tensor, w: CpuWeights, n: int) -> torch.Tensor:
    """``placed`` [M, rows], inputs in packed order, by the weights: [M, n], in the kernel's dtype."""
    if len(placed) > most_tokens(w, placed.dtype):
        return multiply_tiles(placed if placed.dtype == torch.float32 else placed.to(fast_dtype()), w, n)
    if w.is_bytes:
        return multiply_bytes(placed.to(torch.bfloat16), w.codes, w.scales_and_zeros, w.sym)[:, :n]
    rows, codes, unit = _for_nibbles(placed, w)
    out = torch.ops.aten._weight_int4pack_mm_for_cpu.default(rows, codes, unit, w.scales_and_zeros)
    return out if out.shape[1] == n else out[:, :n]


def multiply_runs(placed: torch.Tensor, w: CpuWeights, n: int, runs: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Rows of ``placed`` [S, rows], each by the weights of its expert: [S, n], in the kernel's dtype.

    Args:
        placed: Inputs in the packed order of their expert.
        w: Of all experts.
        n: Number of outputs.
        runs: (expert, rows) in the order of the rows.
    """
    lengths = [rows for _, rows in runs]
    if w.is_bytes or max(lengths) > most_tokens(w, placed.dtype):
        parts = zip(placed.split(lengths), runs, strict=True)
        return torch.cat([multiply(part, w.of(expert), n) for part, (expert, _) in parts])
    # A product may take less than 100 us, so all that is the same for every expert is done once.
    every, codes, unit = _for_nibbles(placed, w)
    kernel, scales_and_zeros = torch.ops.aten._weight_int4pack_mm_for_cpu.default, w.scales_and_zeros
    out = torch.cat(
        [
            kernel(part, codes.select(0, expert), unit, scales_and_zeros.select(0, expert))
            for part, (expert, _) in zip(every.split(lengths), runs, strict=True)
        ]
    )
    return out if out.shape[1] == n else out[:, :n]


def _for_nibbles(placed: torch.Tensor, w: CpuWeights) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The int4 kernel's activations, codes (of all experts, if ``w`` has many) and input rows per scale."""
    placed = placed.to(torch.bfloat16)
    if w.halves == 2:
        placed = torch.cat((placed, placed), 1)
    units, columns, _ = w.scales_and_zeros.shape[-3:]
    rows = placed.shape[1]
    return placed, w.codes.view(*w.codes.shape[:-3], columns, rows // 2), rows // units


def multiply_bytes(
    placed: torch.Tensor, codes: torch.Tensor, scales_and_zeros: torch.Tensor, sym: bool
) -> torch.Tensor:
    """bf16 [M, rows] by the tensors of ``Int8Layout``: float32 [M, outputs]."""
    units, _, unit = codes.shape
    parts = placed.view(-1, units, unit).transpose(0, 1).contiguous()
    kernel = torch.ops.aten._weight_int8pack_mm.default
    products = [kernel(part, own, scale) for part, own, scale in zip(parts, codes, scales_and_zeros[:, 0], strict=True)]
    out = products[0].float() if units == 1 else torch.stack(products).sum(0, dtype=torch.float32)
    if not sym:
        out.addmm_(parts.sum(2, dtype=torch.float32).T, scales_and_zeros[:, 1:].sum(1, dtype=torch.float32))
    return out
