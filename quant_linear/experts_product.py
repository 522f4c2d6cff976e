"""One bare product of all experts as an operator with a gradient: what training and unnamed activations are made of."""

from __future__ import annotations

from dataclasses import replace

import torch

from graftq.quant_linear.experts_ops import (
    BARE,
    Stack,
    kernel_constants,
    kernel_weights,
    matrix_tile,
    multiply,
    prepare,
    rows_of,
    stack_schema,
)
from graftq.quant_linear.experts_tiles import choose_tokens
from graftq.quant_linear.kernels.dequant import dequantize_kernel
from graftq.quant_linear.kernels.launch import launch
from graftq.quant_linear.ops import device_of

_ARGUMENTS = f"Tensor x, Tensor index, {stack_schema('')}, int share, int part_rows, int rows"
_library = torch.library.Library("graftq", "FRAGMENT")
_library.define(f"tiled_experts_product({_ARGUMENTS}) -> Tensor")
_library.define(f"tiled_experts_product_grad({_ARGUMENTS}, int features) -> Tensor")


def _tiled_experts_product(x: torch.Tensor, index: torch.Tensor, *arguments: object) -> torch.Tensor:
    """One product [slots, rows], 0 for nobody's slots; ``x`` [slots / share, K]. Arguments: stack, share, sizes."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            return _tiled_experts_product(x, index, *arguments)
    stack, (share, part_rows, rows) = Stack(*arguments[:-3]), arguments[-3:]  # type: ignore[arg-type]
    assert isinstance(share, int)
    assert isinstance(part_rows, int)
    assert isinstance(rows, int)
    index = index.contiguous().view(-1)
    out = x.new_zeros(len(index), rows)
    if len(index) == 0:
        return out
    stack = stack._replace(bias=None)
    overlap = device_of(x.device).capability >= 90
    tokens = choose_tokens(len(index), stack.codes.shape[0])
    prepared = prepare(rows_of(x), index, stack, share, overlap, tokens)
    tile = replace(matrix_tile(prepared, stack, rows), splits=1)
    multiply(prepared, stack, BARE, tile, rows, part_rows, out, overlap)
    return out


def _tiled_experts_product_grad(grad: torch.Tensor, index: torch.Tensor, *arguments: object) -> torch.Tensor:
    """The gradient [slots / share, features] of the product's ``x``. Arguments: as for the product, then features.

    Expert by expert from dequantised weights; waits for the device, to learn which experts have tokens.
    """
    if grad.is_cuda and grad.device.index != torch.cuda.current_device():
        with torch.cuda.device(grad.device):
            return _tiled_experts_product_grad(grad, index, *arguments)
    stack = Stack(*arguments[:-4])  # type: ignore[arg-type]
    share, part_rows, rows, features = (int(number) for number in arguments[-4:])  # type: ignore[call-overload]
    index = index.reshape(-1)
    total = torch.zeros(len(index) // share, features + 1, dtype=torch.float32, device=grad.device)
    for expert in torch.unique(index).tolist():
        if not 0 <= expert < len(stack.codes):
            continue
        slots = torch.where(index == expert)[0]
        weights = _plain(stack, expert, grad.dtype)
        for part, first in enumerate(range(0, rows, part_rows)):
            last = min(first + part_rows, rows)
            inputs = (grad[slots, first:last] @ weights[first:last]).float()
            if stack.order is None:
                place = torch.arange(inputs.shape[1], device=grad.device)
            else:
                place = stack.order[expert, part].long()
            # One column more, for what padding received.
            total.index_put_((slots[:, None] // share, place.clamp(max=features)), inputs, accumulate=True)
    return total[:, :features].to(grad.dtype)


def _plain(stack: Stack, expert: int, dtype: torch.dtype) -> torch.Tensor:
    """One expert's weights, dequantised: [64 * tiles, 128 * atoms], inputs in packed order."""
    tiles, atoms = stack.codes.shape[1:3]
    out = torch.empty(tiles * 64, atoms * 128, dtype=dtype, device=stack.codes.device)
    bits, group, sym, program, _ = kernel_constants(stack, dtype)
    launch(
        dequantize_kernel,
        (tiles, atoms, 1),
        (*(tensor[expert] for tensor in kernel_weights(stack)), out),
        (0, tiles * 64, atoms, stack.scales.shape[1], tiles * 64, tiles * 64),
        (bits, group, sym, 0, program),
        (("num_warps", 4), ("num_stages", 1)),
    )
    return out


class TiledProduct(torch.autograd.Function):
    """``tiled_experts_product`` with a gradient to the activations; the weights are frozen."""

    @staticmethod
    def forward(ctx, x, index, *arguments):
        """Arguments as for ``tiled_experts_product``."""
        ctx.save_for_backward(index, *arguments[:7])
        ctx.numbers = arguments[7:]
        ctx.features = x.shape[1]
        return torch.ops.graftq.tiled_experts_product(x, index, *arguments)

    @staticmethod
    def backward(ctx, grad):
        """To ``x`` alone."""
        dx = torch.ops.graftq.tiled_experts_product_grad(grad, *ctx.saved_tensors, *ctx.numbers, ctx.features)
        return (dx, *[None] * 13)


_library.impl("tiled_experts_product", _tiled_experts_product, "CompositeExplicitAutograd")
_library.impl("tiled_experts_product_grad", _tiled_experts_product_grad, "CompositeExplicitAutograd")


@torch.library.register_fake("graftq::tiled_experts_product", lib=_library)
def _(x: torch.Tensor, index: torch.Tensor, *arguments: object) -> torch.Tensor:
    return x.new_empty(index.numel(), arguments[-1])  # type: ignore[call-overload]


@torch.library.register_fake("graftq::tiled_experts_product_grad", lib=_library)
def _(grad: torch.Tensor, index: torch.Tensor, *arguments: object) -> torch.Tensor:
    share, _, _, features = arguments[-4:]
    return grad.new_empty(index.numel() // share, features)  # type: ignore[call-overload, operator]
