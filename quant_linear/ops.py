"""The tiled linear layer as operators of ``torch.ops.graftq``: what ``torch.compile`` and CUDA graphs see.

The library is defined by hand rather than by ``torch.library.custom_op``: that costs a call several microseconds more,
which is what a decode step has least of.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

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


class Weights(NamedTuple):
    """One projection in the operators' order of arguments: the tensors of ``TiledLayout``, then its numbers.

    ``group`` is ``TiledLayout.group``'s answer; ``sym`` and ``zero_offset`` are the spec's.
    """

    codes: torch.Tensor
    high: torch.Tensor | None
    scales: torch.Tensor
    qzeros: torch.Tensor
    order: torch.Tensor | None
    bias: torch.Tensor | None
    bits: int
    group: int
    sym: bool
    zero_offset: int


_WEIGHTS = (
    "Tensor codes, Tensor? high, Tensor scales, Tensor qzeros, Tensor? order, Tensor? bias, "
    "int bits, int group, bool sym, int zero_offset"
)
_library = torch.library.Library("graftq", "FRAGMENT")
_library.define(f"tiled_linear(Tensor x, {_WEIGHTS}, int out_features) -> Tensor")
_library.define(f"tiled_linear_input_grad(Tensor grad, {_WEIGHTS}, int in_features) -> Tensor")


@lru_cache(maxsize=64)
def device_of(device: torch.device) -> Device:
    """What a tile choice depends on."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        capability = 0 if torch.version.hip else properties.major * 10 + properties.minor
        return Device("hip" if torch.version.hip else "cuda", capability, properties.multi_processor_count)
    return Device(device.type, 0, 64)  # the interpreter, or a device whose tiles nobody has measured


@lru_cache(maxsize=64)
def program_for(device: torch.device, bits: int, dtype: torch.dtype, sym: bool) -> str:
    """The unpacking text for ``device``: inline PTX where there is PTX with the instructions, else ""."""
    if device_of(device).capability < 80:
        return ""
    return unpack_program(bits, "fp16" if dtype == torch.float16 else "bf16", 2 ** (bits - 1) if sym else None)


def _tiled_linear(x: torch.Tensor, *arguments: object) -> torch.Tensor:
    """``x @ W.T + bias`` for ``x`` [M, K], fp16 or bf16; [M, N] contiguous. Arguments: :class:`Weights`, then N."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():  # Triton launches on the current device
        with torch.cuda.device(x.device):
            return _tiled_linear(x, *arguments)
    w, n = Weights(*arguments[:-1]), arguments[-1]  # type: ignore[arg-type]
    assert isinstance(n, int)
    m, k = x.shape
    out = x.new_empty(m, n)
    if m == 0:
        return out
    if x.stride(1) != 1:
        x = x.contiguous()
    device = device_of(x.device)
    atoms = w.codes.shape[1]
    tile = choose(device, w.bits, w.group, n, atoms * 128, m)
    overlap = w.order is not None and tile is not None and device.capability >= 90
    if w.order is not None:
        x, k = _gather(x, w.order, overlap), atoms * 128
    if tile is None:
        _multiply_plain(x, w, out)
    else:
        _multiply_tiled(x, k, w, out, tile, overlap)
    return out


def _multiply_tiled(x: torch.Tensor, k: int, w: Weights, out: torch.Tensor, tile: Tile, overlap: bool) -> None:
    m, n = out.shape
    atoms = w.codes.shape[1]
    tiles = -(-n // tile.rows) * (1 if tile.tokens == 1 else -(-m // tile.tokens))
    partials = arrivals = w.scales  # any tensor: without splits the kernel touches neither
    if tile.splits > 1:
        partials = torch.empty(tile.splits * m * n, dtype=torch.float32, device=x.device)
        arrivals = counters(x.device, tiles)
    tensors = (
        x,
        w.codes,
        w.codes if w.high is None else w.high,
        w.scales,
        w.qzeros,
        w.scales if w.bias is None else w.bias,
        out,
        partials,
        arrivals,
    )
    strides = (w.scales.stride(0), w.qzeros.stride(0))
    program = program_for(x.device, w.bits, x.dtype, w.sym)
    weights = (w.bits, w.group, w.sym, w.zero_offset, program, w.bias is not None)
    mask_k = k < atoms * 128
    grid, options = (tiles, tile.splits, 1), launch_options(tile, overlap)
    if tile.tokens == 1:
        constants = (*weights, mask_k, overlap, tile.rows, tile.unroll, tile.splits)
        launch(vector_kernel, grid, tensors, (n, k, atoms, *strides), constants, options)
        return
    numbers = (m, n, k, atoms, w.scales.shape[0], x.stride(0), *strides)
    masks = (m % tile.tokens > 0, mask_k)
    shape = (tile.rows, tile.tokens, tile.unroll, tile.splits)
    launch(
        matrix_kernel, grid, tensors, numbers,
        (*weights, *masks, tile.scale_weights, m > tile.tokens, overlap, *shape), options,
    )  # fmt: skip


@lru_cache(maxsize=256)
def launch_options(tile: Tile, overlap: bool) -> Options:
    """Those of ``tile``; ``overlap`` is whether the kernel may start before the one before it ends."""
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
    # Tokens first: a grid's first dimension is the only one that may exceed 65535.
    grid = (m, -(-places // block), 1)
    launch(gather_kernel, grid, (x, order, out), (k, places, x.stride(0)), (block, overlap), (("num_warps", 4),))
    return out


def _plain_runs(w: Weights, n: int, dtype: torch.dtype) -> Iterator[tuple[int, torch.Tensor]]:
    """Dequantised weights, a bounded run of output rows at a time, each over the last: (first row, [rows, places])."""
    tiles, atoms = -(-n // 64), w.codes.shape[1]
    most = max(1, WORKSPACE_BYTES // (64 * 128 * atoms * dtype.itemsize))
    step = -(-tiles // -(-tiles // most))  # runs of even length
    space = torch.empty(step * 64, atoms * 128, dtype=dtype, device=w.codes.device)
    program = program_for(w.codes.device, w.bits, dtype, w.sym)
    for first in range(0, tiles, step):
        count = min(step, tiles - first)
        launch(
            dequantize_kernel,
            (count, atoms, 1),
            (w.codes, w.codes if w.high is None else w.high, w.scales, w.qzeros, space),
            (first, n, atoms, w.scales.shape[0], w.scales.stride(0), w.qzeros.stride(0)),
            (w.bits, w.group, w.sym, w.zero_offset, program),
            (("num_warps", 4), ("num_stages", 1)),
        )
        yield first * 64, space[: min(count * 64, n - first * 64)]


def _multiply_plain(x: torch.Tensor, w: Weights, out: torch.Tensor) -> None:
    for first, weights in _plain_runs(w, out.shape[1], x.dtype):
        last = first + len(weights)
        transposed = weights[:, : x.shape[1]].T
        if w.bias is None:
            torch.mm(x, transposed, out=out[:, first:last])
        else:
            torch.addmm(w.bias[first:last].to(x.dtype), x, transposed, out=out[:, first:last])


def _tiled_linear_input_grad(grad: torch.Tensor, *arguments: object) -> torch.Tensor:
    """``grad @ W`` for ``grad`` [M, N]: [M, K], summed over runs of N in its dtype. Arguments: Weights, then K."""
    if grad.is_cuda and grad.device.index != torch.cuda.current_device():
        with torch.cuda.device(grad.device):
            return _tiled_linear_input_grad(grad, *arguments)
    w, k = Weights(*arguments[:-1]), arguments[-1]  # type: ignore[arg-type]
    assert isinstance(k, int)
    m, n = grad.shape
    total = grad.new_zeros(m, w.codes.shape[1] * 128)
    for first, weights in _plain_runs(w, n, grad.dtype):
        total.addmm_(grad[:, first : first + len(weights)], weights)
    if w.order is None:
        return total[:, :k].contiguous()
    scattered = grad.new_empty(m, k + 1)  # one column more, for what padding received
    scattered.index_copy_(1, w.order.clamp(max=k).long(), total)
    return scattered[:, :k].contiguous()


class TiledLinear(torch.autograd.Function):
    """``tiled_linear`` with a gradient to the activations; the weights are frozen.

    Not registered for the operator itself: that costs each call some 10 us of Python, gradient or not.
    """

    @staticmethod
    def forward(ctx, x, *arguments):
        """Arguments as for ``tiled_linear``."""
        ctx.save_for_backward(*arguments[:6])
        ctx.numbers = arguments[6:-1]
        ctx.in_features = x.shape[1]
        return torch.ops.graftq.tiled_linear(x, *arguments)

    @staticmethod
    def backward(ctx, grad):
        """To ``x`` alone."""
        dx = torch.ops.graftq.tiled_linear_input_grad(grad, *ctx.saved_tensors, *ctx.numbers, ctx.in_features)
        return (dx, *[None] * 11)


_library.impl("tiled_linear", _tiled_linear, "CompositeExplicitAutograd")
_library.impl("tiled_linear_input_grad", _tiled_linear_input_grad, "CompositeExplicitAutograd")


@torch.library.register_fake("graftq::tiled_linear", lib=_library)
@torch.library.register_fake("graftq::tiled_linear_input_grad", lib=_library)
def _(x: torch.Tensor, *arguments: object) -> torch.Tensor:
    return x.new_empty(x.shape[0], arguments[-1])  # type: ignore[call-overload]
