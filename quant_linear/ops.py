"""The tiled linear layer as operators of ``torch.ops.graftq``: what ``torch.compile`` and CUDA graphs see.

The library is defined by hand rather than by ``torch.library.custom_op``: that costs a call several microseconds more,
which is what a decode step has least of.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from graftq.quant_linear.kernels.dequant import dequantize_kernel
from graftq.quant_linear.kernels.gather import gather_kernel
from graftq.quant_linear.kernels.gemm import matrix_kernel
from graftq.quant_linear.kernels.gemv import vector_kernel
from graftq.quant_linear.kernels.launch import Options, launch
from graftq.quant_linear.kernels.unpack import unpack_program
from graftq.quant_linear.tiles import Device, Tile, choose
from graftq.quant_linear.workspace import counters

WORKSPACE_BYTES = 128 * 2**20
"""Most memory that dequantised weights take at a time, unless one tile of 64 output rows needs more."""

_WEIGHTS = (
    "Tensor codes, Tensor? high, Tensor scales, Tensor qzeros, Tensor? order, Tensor? bias, "
    "int bits, int group, bool sym, int zero_offset"
)
_library = torch.library.Library("graftq", "FRAGMENT")
_library.define(f"tiled_linear(Tensor x, {_WEIGHTS}, int out_features) -> Tensor")
_library.define(f"tiled_linear_input_grad(Tensor grad, {_WEIGHTS}, int in_features) -> Tensor")


@lru_cache(maxsize=64)
def _device(device: torch.device) -> Device:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        capability = 0 if torch.version.hip else properties.major * 10 + properties.minor
        return Device("hip" if torch.version.hip else "cuda", capability, properties.multi_processor_count)
    return Device(device.type, 0, 64)  # the interpreter, or a device whose tiles nobody has measured


@lru_cache(maxsize=64)
def _program(device: torch.device, bits: int, dtype: torch.dtype, zero: int | None) -> str:
    """The unpacking text for ``device``: inline PTX where there is PTX with the instructions, else ""."""
    if _device(device).capability < 80:
        return ""
    return unpack_program(bits, "fp16" if dtype == torch.float16 else "bf16", zero)


def _tiled_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    high: torch.Tensor | None,
    scales: torch.Tensor,
    qzeros: torch.Tensor,
    order: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    group: int,
    sym: bool,
    zero_offset: int,
    out_features: int,
) -> torch.Tensor:
    """``x @ W.T + bias`` for ``x`` [M, K], fp16 or bf16, weights as ``TiledLayout`` packs them; [M, N] contiguous."""
    m, k = x.shape
    out = x.new_empty(m, out_features)
    if m == 0:
        return out
    if x.stride(1) != 1:
        x = x.contiguous()
    device = _device(x.device)
    atoms = codes.shape[1]
    tile = choose(device, bits, group, out_features, atoms * 128, m)
    overlap = order is not None and tile is not None and device.capability >= 90
    if order is not None:
        x, k = _gather(x, order, overlap), atoms * 128
    if tile is None:
        _multiply_plain(x, out, codes, high, scales, qzeros, bias, bits, group, sym, zero_offset)
        return out
    tiles = -(-out_features // tile.rows) * (1 if tile.tokens == 1 else -(-m // tile.tokens))
    partials = arrivals = scales  # any tensor: without splits the kernel touches neither
    if tile.splits > 1:
        partials = torch.empty(tile.splits * m * out_features, dtype=torch.float32, device=x.device)
        arrivals = counters(x.device, tiles)
    program = _program(x.device, bits, x.dtype, 2 ** (bits - 1) if sym else None)
    tensors = (
        x, codes, codes if high is None else high, scales, qzeros, scales if bias is None else bias, out,
        partials, arrivals,
    )  # fmt: skip
    weights = (bits, group, sym, zero_offset, program, bias is not None)
    if tile.tokens == 1:
        numbers = (out_features, k, atoms, scales.stride(0), qzeros.stride(0))
        constants = (*weights, k < atoms * 128, overlap, tile.rows, tile.unroll, tile.splits)
        launch(vector_kernel, (tiles, tile.splits, 1), tensors, numbers, constants, _options(tile, overlap))
    else:
        numbers = (m, out_features, k, atoms, scales.shape[0], x.stride(0), scales.stride(0), qzeros.stride(0))
        constants = (
            *weights, m % tile.tokens > 0, k < atoms * 128, tile.scale_weights, m > tile.tokens, overlap,
            tile.rows, tile.tokens, tile.unroll, tile.splits,
        )  # fmt: skip
        launch(matrix_kernel, (tiles, tile.splits, 1), tensors, numbers, constants, _options(tile, overlap))
    return out


@lru_cache(maxsize=256)
def _options(tile: Tile, overlap: bool) -> Options:
    options: list[tuple[str, int | bool]] = [("num_warps", tile.warps), ("num_stages", tile.stages)]
    if tile.registers is not None:
        options.append(("maxnreg", tile.registers))
    if overlap:
        options.append(("launch_pdl", True))
    return tuple(options)


def _gather(x: torch.Tensor, order: torch.Tensor, overlap: bool) -> torch.Tensor:
    """``x`` [M, K] in packed order, zeros where there is padding: [M, places]."""
    m, k = x.shape
    places = order.shape[0]
    out = x.new_empty(m, places)
    block = 256 if m <= 64 else 1024
    grid = (-(-places // block), m, 1)
    launch(gather_kernel, grid, (x, order, out), (k, places, x.stride(0)), (block, overlap), (("num_warps", 4),))
    return out


def _plain_runs(codes, high, scales, qzeros, bits, group, sym, zero_offset, out_features, dtype):  # noqa: ANN001, ANN202
    """Dequantised weights, a bounded run of output rows at a time, each over the last: (first row, [rows, places])."""
    tiles, atoms = codes.shape[:2]
    most = max(1, WORKSPACE_BYTES // (64 * 128 * atoms * dtype.itemsize))
    runs = -(-tiles // most)
    step = -(-tiles // runs)
    space = torch.empty(step * 64, atoms * 128, dtype=dtype, device=codes.device)
    program = _program(codes.device, bits, dtype, 2 ** (bits - 1) if sym else None)
    for first in range(0, tiles, step):
        count = min(step, tiles - first)
        launch(
            dequantize_kernel,
            (count, atoms, 1),
            (codes, codes if high is None else high, scales, qzeros, space),
            (first, out_features, atoms, scales.shape[0], scales.stride(0), qzeros.stride(0)),
            (bits, group, sym, zero_offset, program),
            (("num_warps", 4), ("num_stages", 1)),
        )
        yield first * 64, space[: min(count * 64, out_features - first * 64)]


def _multiply_plain(x, out, codes, high, scales, qzeros, bias, bits, group, sym, zero_offset) -> None:  # noqa: ANN001
    runs = _plain_runs(codes, high, scales, qzeros, bits, group, sym, zero_offset, out.shape[1], x.dtype)
    for first, weights in runs:
        last = first + len(weights)
        transposed = weights[:, : x.shape[1]].T
        if bias is None:
            torch.mm(x, transposed, out=out[:, first:last])
        else:
            torch.addmm(bias[first:last].to(x.dtype), x, transposed, out=out[:, first:last])


def _tiled_linear_input_grad(
    grad: torch.Tensor,
    codes: torch.Tensor,
    high: torch.Tensor | None,
    scales: torch.Tensor,
    qzeros: torch.Tensor,
    order: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    group: int,
    sym: bool,
    zero_offset: int,
    in_features: int,
) -> torch.Tensor:
    """``grad @ W`` for ``grad`` [M, N]: [M, K], summed over runs of N in the dtype of ``grad``."""
    m, n = grad.shape
    places = codes.shape[1] * 128
    total = grad.new_zeros(m, places)
    for first, weights in _plain_runs(codes, high, scales, qzeros, bits, group, sym, zero_offset, n, grad.dtype):
        total.addmm_(grad[:, first : first + len(weights)], weights)
    if order is None:
        return total[:, :in_features].contiguous()
    scattered = grad.new_empty(m, in_features + 1)  # one column more, for what padding received
    scattered.index_copy_(1, order.clamp(max=in_features).long(), total)
    return scattered[:, :in_features].contiguous()


class TiledLinear(torch.autograd.Function):
    """``tiled_linear`` with a gradient to the activations; the weights are frozen.

    Not registered for the operator itself: that costs each call some 10 us of Python, gradient or not.
    """

    @staticmethod
    def forward(ctx, x, *arguments):  # noqa: ANN001, ANN002, ANN205, D102
        *weights, _ = arguments
        ctx.save_for_backward(*weights[:6])
        ctx.numbers = weights[6:]
        ctx.in_features = x.shape[1]
        return torch.ops.graftq.tiled_linear(x, *arguments)

    @staticmethod
    def backward(ctx, grad):  # noqa: ANN001, ANN205, D102
        dx = torch.ops.graftq.tiled_linear_input_grad(grad, *ctx.saved_tensors, *ctx.numbers, ctx.in_features)
        return (dx, *[None] * 11)


_library.impl("tiled_linear", _tiled_linear, "CompositeExplicitAutograd")
_library.impl("tiled_linear_input_grad", _tiled_linear_input_grad, "CompositeExplicitAutograd")


@torch.library.register_fake("graftq::tiled_linear", lib=_library)
def _(x, codes, high, scales, qzeros, order, bias, bits, group, sym, zero_offset, out_features):  # noqa: ANN001, ANN202
    return x.new_empty(x.shape[0], out_features)


@torch.library.register_fake("graftq::tiled_linear_input_grad", lib=_library)
def _(grad, codes, high, scales, qzeros, order, bias, bits, group, sym, zero_offset, in_features):  # noqa: ANN001, ANN202
    return grad.new_empty(grad.shape[0], in_features)

