"""One product of all experts, without activation or bias, as an operator with a gradient.

Training uses it, and layers whose activation the kernels do not know: torch does everything between the products.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from graftq.quant_linear.gpu.devices import device_of
from graftq.quant_linear.gpu.dispatch_bypass import on_its_device
from graftq.quant_linear.gpu.experts.launches import (
    InputRows,
    MatrixProduct,
    Preparation,
    matrix_tile,
)
from graftq.quant_linear.gpu.experts.ops import rows_of, stack_schema
from graftq.quant_linear.gpu.experts.stacks import Stack, StackKind
from graftq.quant_linear.gpu.experts.tile_heuristics import choose_tokens
from graftq.quant_linear.gpu.operands import weight_names
from graftq.quant_linear.kernels.dequant import dequantize_kernel
from graftq.quant_linear.kernels.launch import Launch, LaunchSequence
from graftq.quant_linear.spec import QuantSpec

_ARGUMENTS = f"Tensor x, Tensor index, {stack_schema('')}, str signature, int share, int part_rows, int rows"
# The operators exist as long as this object does. "FRAGMENT", since several modules define operators of `graftq`.
_library = torch.library.Library("graftq", "FRAGMENT")
_library.define(f"tiled_experts_product({_ARGUMENTS}) -> Tensor")
_library.define(f"tiled_experts_product_grad({_ARGUMENTS}, int features) -> Tensor")


@on_its_device
def _tiled_experts_product(
    x: Tensor, index: Tensor,
    codes: Tensor, high: Tensor | None, scales: Tensor, zeros: Tensor | None,
    order: Tensor | None, columns: Tensor | None, bias: Tensor | None,
    signature: str, share: int, part_rows: int, rows: int,
) -> Tensor:  # fmt: skip
    """Each slot's row of ``x`` by the weights of its expert: [slots, rows] in the dtype of ``x``.

    Args:
        x: fp16 or bf16 [slots / share, K], any strides.
        index: Integers, ``slots`` in all: the expert of each slot. Slots without a valid expert get zeros.
        codes, high, scales, zeros, order: One stack of ``TiledExpertsLayout``.
        columns, bias: Of the same stack; not used.
        signature: ``QuantSpec.signature`` of one of the stack's projections.
        share: Consecutive slots that read the same row of ``x``.
        part_rows: Output rows of one part of the stack; ``order`` may differ from part to part.
        rows: Output rows.
    """
    stack = Stack(codes, high, scales, zeros, order, None, None)
    index = index.contiguous().view(-1)
    out = x.new_zeros(len(index), rows)
    if len(index) == 0:
        return out
    x = rows_of(x)
    inputs = InputRows(len(index), share, x.shape[1], x.stride(0))
    launches = _launches(inputs, StackKind.of(stack), signature, x.dtype, index.dtype, part_rows, rows)
    launches(x, index, *stack, out)
    return out


@lru_cache(maxsize=1024)
def _launches(
    inputs: InputRows,
    kind: StackKind,
    signature: str,
    dtype: torch.dtype,
    index_dtype: torch.dtype,  # prepare_kernel is compiled for it
    part_rows: int,
    rows: int,
) -> LaunchSequence:
    """The launches of the calls that have all this in common; one split of K, since the sums are the output."""
    device = device_of(kind.device)
    overlap = device.capability >= 90
    spec = QuantSpec.parse(signature)
    prepare = Preparation(inputs, kind, "", dtype, overlap, choose_tokens(device, inputs.slots, kind.experts))
    tile = replace(matrix_tile(inputs.slots, kind, spec.bits, rows), splits=1)
    product = MatrixProduct(prepare.output, "out", kind, "", spec, dtype, tile, rows, part_rows, overlap)
    return LaunchSequence(("x", "index", *Stack._fields, "out"), prepare.parts, [*prepare.steps, product.step])


@on_its_device
def _tiled_experts_product_grad(
    grad: Tensor, index: Tensor,
    codes: Tensor, high: Tensor | None, scales: Tensor, zeros: Tensor | None,
    order: Tensor | None, columns: Tensor | None, bias: Tensor | None,
    signature: str, share: int, part_rows: int, rows: int, features: int,
) -> Tensor:  # fmt: skip
    """The gradient [slots / share, features] of the product's ``x``, for ``grad`` [slots, rows], in its dtype.

    Expert by expert from dequantized weights, summed in float32. It waits for the device, to learn which experts have
    slots. Other arguments as for the product; ``features`` is K.
    """
    stack = Stack(codes, high, scales, zeros, order, columns, bias)
    spec = QuantSpec.parse(signature)
    index = index.reshape(-1)
    total = torch.zeros(len(index) // share, features + 1, dtype=torch.float32, device=grad.device)
    for expert in torch.unique(index).tolist():
        if not 0 <= expert < len(codes):
            continue
        slots = torch.where(index == expert)[0]
        weights = _dequantized(stack, spec, expert, grad.dtype)
        for part, first in enumerate(range(0, rows, part_rows)):
            last = min(first + part_rows, rows)
            inputs = (grad[slots, first:last] @ weights[first:last]).float()
            if order is None:
                place = torch.arange(inputs.shape[1], device=grad.device)
            else:
                place = order[expert, part].long()
            # The last column takes the gradient of padding.
            total.index_put_((slots[:, None] // share, place.clamp(max=features)), inputs, accumulate=True)
    return total[:, :features].to(grad.dtype)


def _dequantized(stack: Stack, spec: QuantSpec, expert: int, dtype: torch.dtype) -> Tensor:
    """One expert's weights [64 * tiles, 128 * atoms] in ``dtype``, inputs in packed order."""
    kind = StackKind.of(stack)
    out = torch.empty(kind.codes[1] * 64, kind.atoms * 128, dtype=dtype, device=kind.device)
    names = weight_names("", spec.bits, kind.is_symmetric)
    _dequantize_launch(kind, spec.signature, dtype)(*(getattr(stack, name)[expert] for name in names), out)
    return out


@lru_cache(maxsize=256)
def _dequantize_launch(kind: StackKind, signature: str, dtype: torch.dtype) -> Launch:
    tiles, atoms = kind.codes[1:3]
    bits, group, sym, program, _ = kind.constants(QuantSpec.parse(signature), dtype)
    return Launch(
        dequantize_kernel,
        (tiles, atoms, 1),
        (0, tiles * 64, atoms, kind.scale_rows, tiles * 64, tiles * 64),
        (bits, group, sym, program),
        (("num_warps", 4), ("num_stages", 1)),
    )


class TiledProduct(torch.autograd.Function):
    """``tiled_experts_product`` with a gradient to the activations; the weights are frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, index: Tensor,
        codes: Tensor, high: Tensor | None, scales: Tensor, zeros: Tensor | None,
        order: Tensor | None, columns: Tensor | None, bias: Tensor | None,
        signature: str, share: int, part_rows: int, rows: int,
    ) -> Tensor:  # fmt: skip
        """Arguments as for ``tiled_experts_product``."""
        stack, others = (codes, high, scales, zeros, order, columns, bias), (signature, share, part_rows, rows)
        ctx.save_for_backward(index, *stack)
        ctx.others, ctx.features = others, x.shape[1]
        return torch.ops.graftq.tiled_experts_product(x, index, *stack, *others)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """To ``x`` alone."""
        dx = torch.ops.graftq.tiled_experts_product_grad(grad, *ctx.saved_tensors, *ctx.others, ctx.features)
        return dx, *[None] * (len(ctx.saved_tensors) + len(ctx.others))


_library.impl("tiled_experts_product", _tiled_experts_product, "CompositeExplicitAutograd")
_library.impl("tiled_experts_product_grad", _tiled_experts_product_grad, "CompositeExplicitAutograd")


@torch.library.register_fake("graftq::tiled_experts_product", lib=_library)
def _(
    x: Tensor, index: Tensor,
    codes: Tensor, high: Tensor | None, scales: Tensor, zeros: Tensor | None,
    order: Tensor | None, columns: Tensor | None, bias: Tensor | None,
    signature: str, share: int, part_rows: int, rows: int,
) -> Tensor:  # fmt: skip
    return x.new_empty(index.numel(), rows)


@torch.library.register_fake("graftq::tiled_experts_product_grad", lib=_library)
def _(
    grad: Tensor, index: Tensor,
    codes: Tensor, high: Tensor | None, scales: Tensor, zeros: Tensor | None,
    order: Tensor | None, columns: Tensor | None, bias: Tensor | None,
    signature: str, share: int, part_rows: int, rows: int, features: int,
) -> Tensor:  # fmt: skip
    return grad.new_empty(index.numel() // share, features)
