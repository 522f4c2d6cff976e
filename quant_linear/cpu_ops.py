"""The quantised linear layer on a CPU, as operators of ``torch.ops.graftq`` that ``torch.compile`` sees whole.

Few tokens go through torch's int4 kernel, which reads the weights as they are and computes in bf16 with float32 sums.
Many tokens, and float32, go through tiles: some output rows are dequantised into a workspace and multiplied there.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

import torch

from graftq.quant_linear.cpu_layout import byte_codes, shift_of
from graftq.quant_linear.packing import unpack_codes

TILE_BYTES = 4 * 2**20
"""Float32 weights dequantised at a time, unless one block of output rows needs more."""

_FEW_TOKENS = {torch.bfloat16: 40, torch.float32: 16}
"""Most tokens that the int4 kernel is faster for, by the dtype that tiles are multiplied in."""


class Weights(NamedTuple):
    """One projection in the operators' order of arguments: the tensors of ``Int4Layout``, then its numbers.

    For experts, the tensors have a first dimension more. ``sym`` and ``zero_offset`` are the spec's.
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

    def of(self, expert: int) -> Weights:
        """Those of one expert."""
        return self._replace(
            codes=self.codes[expert],
            scales_and_zeros=self.scales_and_zeros[expert],
            groups=self.groups[expert],
            scales=self.scales[expert],
            qzeros=self.qzeros[expert],
            order=None if self.order is None else self.order[expert],
            bias=None if self.bias is None else self.bias[expert],
        )


_WEIGHTS = (
    "Tensor codes, Tensor scales_and_zeros, Tensor groups, Tensor scales, Tensor qzeros, Tensor? order, Tensor? bias, "
    "int bits, bool sym, int zero_offset"
)
_library = torch.library.Library("graftq", "FRAGMENT")
_library.define(f"cpu_linear(Tensor x, {_WEIGHTS}, int out_features) -> Tensor")
_library.define(f"cpu_linear_input_grad(Tensor grad, {_WEIGHTS}, int in_features) -> Tensor")
_library.define(f"cpu_experts_linear(Tensor x, Tensor index, {_WEIGHTS}, int out_features) -> Tensor")
_library.define(f"cpu_experts_linear_input_grad(Tensor grad, Tensor index, {_WEIGHTS}, int in_features) -> Tensor")


@lru_cache(maxsize=1)
def int4_block() -> int | None:
    """Output rows that torch's int4 kernel packs side by side on this machine; None if it cannot be used.

    Asked of the kernel itself, by a small product: the order of the nibbles depends on the instruction set, and the
    kernel on the version of torch.
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
def _fast_dtype() -> torch.dtype:
    """What tiles for bf16 and fp16 models are multiplied in: bf16 is slower than float32 without AVX-512."""
    capability = torch.backends.cpu.get_cpu_capability()
    fast = capability.startswith("AVX512") and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def _linear(x: torch.Tensor, *arguments: object) -> torch.Tensor:
    """``x @ W.T + bias`` for ``x`` [M, K]: [M, N] in its dtype. Arguments: :class:`Weights`, then N."""
    w, n = Weights(*arguments[:-1]), arguments[-1]  # type: ignore[arg-type]
    assert isinstance(n, int)
    exact = x.dtype == torch.float32
    if not exact and len(x) <= _FEW_TOKENS[_fast_dtype()] and int4_block() is not None:
        out = _multiply_nibbles(x, w, n)
    else:
        out = _multiply_tiles(x, w, n, torch.float32 if exact else _fast_dtype())
    if w.bias is not None:
        out = out + w.bias[:n].to(out.dtype)
    return out.to(x.dtype)


def _placed(x: torch.Tensor, w: Weights) -> torch.Tensor:
    """``x`` [M, K] in packed order, zeros where there is padding: [M, rows]."""
    padding = w.codes.shape[2] - x.shape[1]
    if w.order is None:
        return torch.nn.functional.pad(x, (0, padding)) if padding else x.contiguous()
    return (torch.nn.functional.pad(x, (0, 1)) if padding else x).index_select(1, w.order)


def _multiply_nibbles(x: torch.Tensor, w: Weights, n: int) -> torch.Tensor:
    placed = _placed(x.to(torch.bfloat16), w)
    blocks, halves, rows, half_block = w.codes.shape
    if halves == 2:
        placed = torch.cat((placed, placed), 1)
    columns = blocks * half_block * 2
    out = torch.ops.aten._weight_int4pack_mm_for_cpu(
        placed,
        w.codes.view(columns, halves * rows // 2),
        rows // len(w.groups),
        w.scales_and_zeros.view(-1, columns, 2),
    )
    return out if columns == n else out[:, :n]


def _tiles(w: Weights, n: int, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    """Dequantised weights, block by block, from a bounded workspace: (outputs, ``dtype`` [rows, outputs])."""
    blocks, _, rows, half_block = w.codes.shape
    units, block = len(w.groups), 2 * half_block
    scales, offsets = _scales_and_offsets(w, n)
    step = min(blocks, max(1, TILE_BYTES // (4 * block * rows)))
    space = w.codes.new_empty(step, rows, 2, half_block, dtype=torch.float32)
    narrow = space if dtype == torch.float32 else space.new_empty(step, rows, block, dtype=dtype)
    for first in range(0, blocks, step):
        run = slice(first, min(first + step, blocks))
        tile = space[: run.stop - first]
        for half, codes in enumerate(byte_codes(w.codes[run])):
            tile[:, :, half].copy_(codes)
        by_unit = tile.view(len(tile), units, -1, block)
        torch.addcmul(offsets[run], by_unit, scales[run], out=by_unit)
        weights = tile.view(-1, rows, block)
        if dtype != torch.float32:
            weights = narrow[: len(tile)].copy_(weights)
        for index in range(len(tile)):
            outputs = slice((first + index) * block, min((first + index + 1) * block, n))
            yield outputs, weights[index, :, : outputs.stop - outputs.start]


def _scales_and_offsets(w: Weights, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What nibbles are multiplied by, and what is added then: float32 [blocks, units, 1, block] each."""
    blocks, block = w.codes.shape[0], 2 * w.codes.shape[3]
    scales = w.scales[:, :n].float()
    middle: int | torch.Tensor = 2 ** (w.bits - 1)
    if not w.sym:
        middle = unpack_codes(w.qzeros.T, w.bits, n).T.float() + w.zero_offset
    sides = torch.stack((scales, -(middle + shift_of(w.bits)) * scales))
    sides = torch.nn.functional.pad(sides, (0, blocks * block - n)).index_select(1, w.groups)
    first, second = sides.view(2, -1, blocks, block).transpose(1, 2)[:, :, :, None]
    return first, second


def _multiply_tiles(x: torch.Tensor, w: Weights, n: int, dtype: torch.dtype) -> torch.Tensor:
    placed = _placed(x.to(dtype), w)
    out = x.new_empty(len(x), n, dtype=dtype)
    for outputs, weights in _tiles(w, n, dtype):
        out[:, outputs] = placed @ weights
    return out


def _input_grad(grad: torch.Tensor, *arguments: object) -> torch.Tensor:
    """``grad @ W`` for ``grad`` [M, N]: [M, K], summed in float32. Arguments: :class:`Weights`, then K."""
    w, k = Weights(*arguments[:-1]), arguments[-1]  # type: ignore[arg-type]
    assert isinstance(k, int)
    wide = grad.float()
    total = wide.new_zeros(len(grad), w.codes.shape[2])
    for outputs, weights in _tiles(w, grad.shape[1], torch.float32):
        total.addmm_(wide[:, outputs], weights.T)
    if w.order is not None:
        scattered = total.new_zeros(len(grad), k + 1)  # one column more, for what padding received
        total = scattered.index_copy_(1, w.order.long(), total)
    return total[:, :k].to(grad.dtype)


def _runs(index: torch.Tensor, experts: int) -> tuple[torch.Tensor, list[tuple[int | None, int, int]]]:
    """The order that groups ``index`` [R, J] by expert, and (expert, start, stop) of each group; None for sentinels."""
    chosen, by_expert = index.flatten().sort(stable=True)
    runs: list[tuple[int | None, int, int]] = []
    stop = 0
    for expert, group in groupby(chosen.tolist()):
        start, stop = stop, stop + len(list(group))
        runs.append((expert if expert < experts else None, start, stop))
    return by_expert, runs


def _experts_linear(x: torch.Tensor, index: torch.Tensor, *arguments: object) -> torch.Tensor:
    """Row r of ``x`` [R, K] by the weights of each expert in row r of ``index`` [R, J]: [R, J, N], 0 for sentinels."""
    w, n = Weights(*arguments[:-1]), arguments[-1]  # type: ignore[arg-type]
    assert isinstance(n, int)
    rows, slots = index.shape
    by_expert, runs = _runs(index, len(w.codes))
    inputs = x.expand(slots, -1) if rows == 1 else x.index_select(0, by_expert.div(slots, rounding_mode="floor"))
    outputs = [
        x.new_zeros(stop - start, n) if expert is None else _linear(inputs[start:stop], *w.of(expert), n)
        for expert, start, stop in runs
    ]
    out = x.new_empty(rows * slots, n)
    if outputs:
        out.index_copy_(0, by_expert, torch.cat(outputs))
    return out.view(rows, slots, n)


def _experts_input_grad(grad: torch.Tensor, index: torch.Tensor, *arguments: object) -> torch.Tensor:
    """To ``x`` of :func:`_experts_linear`, from ``grad`` [R, J, N]: [R, K]. Arguments: :class:`Weights`, then K."""
    w, k = Weights(*arguments[:-1]), arguments[-1]  # type: ignore[arg-type]
    assert isinstance(k, int)
    by_expert, runs = _runs(index, len(w.codes))
    total = grad.new_zeros(len(index), k, dtype=torch.float32)
    for expert, start, stop in runs:
        if expert is not None:
            slots = by_expert[start:stop]
            found = _input_grad(grad.flatten(0, 1).index_select(0, slots).float(), *w.of(expert), k)
            total.index_add_(0, slots.div(index.shape[1], rounding_mode="floor"), found)
    return total.to(grad.dtype)


class CpuLinear(torch.autograd.Function):
    """``cpu_linear`` with a gradient to the activations; the weights are frozen."""

    @staticmethod
    def forward(ctx, x, *arguments):
        """Arguments as for ``cpu_linear``."""
        ctx.save_for_backward(*arguments[:7])
        ctx.numbers = (*arguments[7:-1], x.shape[1])
        return torch.ops.graftq.cpu_linear(x, *arguments)

    @staticmethod
    def backward(ctx, grad):
        """To ``x`` alone."""
        dx = torch.ops.graftq.cpu_linear_input_grad(grad, *ctx.saved_tensors, *ctx.numbers)
        return (dx, *[None] * 11)


class CpuExpertsLinear(torch.autograd.Function):
    """``cpu_experts_linear`` with a gradient to the activations; the weights are frozen."""

    @staticmethod
    def forward(ctx, x, *arguments):
        """Arguments as for ``cpu_experts_linear``."""
        ctx.save_for_backward(*arguments[:8])
        ctx.numbers = (*arguments[8:-1], x.shape[1])
        return torch.ops.graftq.cpu_experts_linear(x, *arguments)

    @staticmethod
    def backward(ctx, grad):
        """To ``x`` alone."""
        dx = torch.ops.graftq.cpu_experts_linear_input_grad(grad, *ctx.saved_tensors, *ctx.numbers)
        return (dx, *[None] * 12)


_library.impl("cpu_linear", _linear, "CompositeExplicitAutograd")
_library.impl("cpu_linear_input_grad", _input_grad, "CompositeExplicitAutograd")
_library.impl("cpu_experts_linear", _experts_linear, "CompositeExplicitAutograd")
_library.impl("cpu_experts_linear_input_grad", _experts_input_grad, "CompositeExplicitAutograd")


@torch.library.register_fake("graftq::cpu_linear", lib=_library)
@torch.library.register_fake("graftq::cpu_linear_input_grad", lib=_library)
def _(x: torch.Tensor, *arguments: object) -> torch.Tensor:
    return x.new_empty(x.shape[0], arguments[-1])  # type: ignore[call-overload]


@torch.library.register_fake("graftq::cpu_experts_linear", lib=_library)
def _(x: torch.Tensor, index: torch.Tensor, *arguments: object) -> torch.Tensor:
    return x.new_empty(*index.shape, arguments[-1])  # type: ignore[call-overload]


@torch.library.register_fake("graftq::cpu_experts_linear_input_grad", lib=_library)
def _(grad: torch.Tensor, index: torch.Tensor, *arguments: object) -> torch.Tensor:
    return grad.new_empty(grad.shape[0], arguments[-1])  # type: ignore[call-overload]
