"""One bare product of all experts as an operator with a gradient: what training and unnamed activations are made of."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch

from graftq.quant_linear.gpu.devices import device_of
from graftq.quant_linear.gpu.dispatch_bypass import on_its_device
from graftq.quant_linear.gpu.experts.launches import (
    InputRows,
    MatrixProduct,
    Preparation,
    Stack,
    StackKind,
    matrix_tile,
)
from graftq.quant_linear.gpu.experts.ops import rows_of, stack_schema
from graftq.quant_linear.gpu.experts.tile_heuristics import choose_tokens
from graftq.quant_linear.kernels.dequant import dequantize_kernel
from graftq.quant_linear.kernels.launch import Launch
from graftq.quant_linear.spec import QuantSpec

_ARGUMENTS = f"Tensor x, Tensor index, {stack_schema('')}, str signature, int share, int part_rows, int rows"
_library = torch.library.Library("graftq", "FRAGMENT")
_library.define(f"tiled_experts_product({_ARGUMENTS}) -> Tensor")
_library.define(f"tiled_experts_product_grad({_ARGUMENTS}, int features) -> Tensor")


@on_its_device
def _tiled_experts_product(x: torch.Tensor, index: torch.Tensor, *arguments: object) -> torch.Tensor:
    """One product [slots, rows], 0 for nobody's slots; ``x`` [slots / share, K]. Arguments: stack, signature, sizes."""
    *tensors, signature, share, part_rows, rows = arguments
    stack = Stack(*tensors)._replace(bias=None)  # type: ignore[arg-type]
    assert isinstance(rows, int)
    index = index.contiguous().view(-1)
    out = x.new_zeros(len(index), rows)
    if len(index) == 0:
        return out
    x = rows_of(x)
    given = InputRows(len(index), share, x.shape[1], x.stride(0))  # type: ignore[arg-type]
    prepare, multiply = _launches(given, StackKind.of(stack), signature, x.dtype, index.dtype, part_rows, rows)
    multiply(prepare(x, index, stack.order), stack, out)
    return out


@lru_cache(maxsize=1024)
def _launches(
    given: InputRows,
    kind: StackKind,
    signature: str,
    dtype: torch.dtype,
    index_dtype: torch.dtype,  # a kernel is compiled for it
    part_rows: int,
    rows: int,
) -> tuple[Preparation, MatrixProduct]:
    overlap = device_of(kind.device).capability >= 90
    spec = QuantSpec.parse(signature)
    prepare = Preparation(given, kind, overlap, choose_tokens(given.slots, kind.experts))
    tile = replace(matrix_tile(given.slots, kind, spec.bits, rows), splits=1)
    return prepare, MatrixProduct(prepare.rows, kind, spec, dtype, tile, rows, part_rows, overlap)


@on_its_device
def _tiled_experts_product_grad(grad: torch.Tensor, index: torch.Tensor, *arguments: object) -> torch.Tensor:
    """The gradient [slots / share, features] of the product's ``x``. Arguments: as for the product, then features.

    Expert by expert from dequantized weights; waits for the device, to learn which experts have tokens.
    """
    *tensors, signature = arguments[:-4]
    stack, spec = Stack(*tensors), QuantSpec.parse(signature)  # type: ignore[arg-type]
    share, part_rows, rows, features = (int(number) for number in arguments[-4:])  # type: ignore[call-overload]
    index = index.reshape(-1)
    total = torch.zeros(len(index) // share, features + 1, dtype=torch.float32, device=grad.device)
    for expert in torch.unique(index).tolist():
        if not 0 <= expert < len(stack.codes):
            continue
        slots = torch.where(index == expert)[0]
        weights = _plain(stack, spec, expert, grad.dtype)
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


def _plain(stack: Stack, spec: QuantSpec, expert: int, dtype: torch.dtype) -> torch.Tensor:
    """One expert's weights, dequantized: [64 * tiles, 128 * atoms], inputs in packed order."""
    kind = StackKind.of(stack)
    out = torch.empty(kind.codes[1] * 64, kind.atoms * 128, dtype=dtype, device=kind.device)
    _dequantize(kind, spec.signature, dtype)(*(tensor[expert] for tensor in stack.weights), out)
    return out


@lru_cache(maxsize=256)
def _dequantize(kind: StackKind, signature: str, dtype: torch.dtype) -> Launch:
    tiles, atoms = kind.codes[1:3]
    bits, group, sym, program, _ = kind.constants(QuantSpec.parse(signature), dtype)
    return Launch(
        dequantize_kernel,
        (tiles, atoms, 1),
        (0, tiles * 64, atoms, kind.scale_rows, tiles * 64, tiles * 64),
        (bits, group, sym, 0, program),
        (("num_warps", 4), ("num_stages", 1)),
    )


class TiledProduct(torch.autograd.Function):
    """``tiled_experts_product`` with a gradient to the activations; the weights are frozen."""

    @staticmethod
    def forward(ctx, x, index, *arguments):
        """Arguments as for ``tiled_experts_product``."""
        ctx.save_for_backward(index, *arguments[:7])
        ctx.others = arguments[7:]
        ctx.features = x.shape[1]
        return torch.ops.graftq.tiled_experts_product(x, index, *arguments)

    @staticmethod
    def backward(ctx, grad):
        """To ``x`` alone."""
        dx = torch.ops.graftq.tiled_experts_product_grad(grad, *ctx.saved_tensors, *ctx.others, ctx.features)
        return (dx, *[None] * 12)


_library.impl("tiled_experts_product", _tiled_experts_product, "CompositeExplicitAutograd")
_library.impl("tiled_experts_product_grad", _tiled_experts_product_grad, "CompositeExplicitAutograd")


@torch.library.register_fake("graftq::tiled_experts_product", lib=_library)
def _(x: torch.Tensor, index: torch.Tensor, *arguments: object) -> torch.Tensor:
    return x.new_empty(index.numel(), arguments[-1])  # type: ignore[call-overload]


@torch.library.register_fake("graftq::tiled_experts_product_grad", lib=_library)
def _(grad: torch.Tensor, index: torch.Tensor, *arguments: object) -> torch.Tensor:
    share, _, _, features = arguments[-4:]
    return grad.new_empty(index.numel() // share, features)  # type: ignore[call-overload, operator]
