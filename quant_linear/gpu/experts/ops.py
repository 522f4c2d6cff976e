"""Experts as an operator of ``torch.ops.graftq``, for ``torch.compile`` and CUDA graphs; it never waits for the device.

``tiled_experts`` is a whole layer: routing and act-order's gathering (one launch, or none), the first product with its
activation, the second, and the weighted sum (which a single token's second product does itself). Sums are in float32
and in a fixed order: the same bits at every run.

What decides, by the measurements of ``docs/performance.md`` and of a prototype: few tokens cost the weights' bytes, so
each expert's are read once, and everything else must be few launches and no second pass. The routing shares its launch
with the gathering; ``down_proj``'s act-order is in the layout; activation and bias are in the first product's last
step; splits of K are added up by whoever reads the sums next. On Hopper each launch overlaps the start of the next
(programmatic dependent launch), and waits before it reads or writes anything that another kernel may still hold.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from graftq.quant_linear.experts_spec import ExpertsForm
from graftq.quant_linear.gpu.devices import device_of
from graftq.quant_linear.gpu.dispatch_bypass import on_its_device
from graftq.quant_linear.gpu.experts.launches import (
    InputRows,
    MatrixProduct,
    Preparation,
    Prepared,
    SplitSpace,
    Stack,
    StackKind,
    formula_constants,
    matrix_tile,
)
from graftq.quant_linear.gpu.experts.tile_heuristics import (
    TOKENS_AT_ONCE,
    choose_tokens,
    choose_vector,
    has_vector_form,
)
from graftq.quant_linear.gpu.tiled_layout import TiledLayout
from graftq.quant_linear.kernels.experts_gemv import down_vector_kernel, up_vector_kernel
from graftq.quant_linear.kernels.experts_sum import weighted_sum_kernel
from graftq.quant_linear.kernels.launch import Launch


def stack_schema(prefix: str) -> str:
    """The arguments of an operator that make a :class:`Stack`."""
    tensors = ("codes", "high?", "scales", "zeros?", "order?", "columns?", "bias?")
    return ", ".join(f"Tensor{'?' if name.endswith('?') else ''} {prefix}{name.rstrip('?')}" for name in tensors)


_library = torch.library.Library("graftq", "FRAGMENT")
_library.define(
    f"tiled_experts(Tensor x, Tensor index, Tensor weights, {stack_schema('up_')}, {stack_schema('down_')}, "
    "str signature) -> Tensor"
)


@on_its_device
def tiled_experts(x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, *arguments: object) -> torch.Tensor:
    """The layer's output [T, H] for ``x`` [T, H], fp16 or bf16. Arguments: the stacks up and down, the signature."""
    *tensors, signature = arguments
    size = len(Stack._fields)
    up, down = Stack(*tensors[:size]), Stack(*tensors[size:])  # type: ignore[arg-type]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if index.numel() == 0:
        return out.zero_()
    x, index, weights = rows_of(x), index.contiguous(), weights.contiguous()
    for start in range(0, x.shape[0], TOKENS_AT_ONCE):
        inputs = (x, index, weights, out)
        if x.shape[0] > TOKENS_AT_ONCE:
            inputs = tuple(tensor[start : start + TOKENS_AT_ONCE] for tensor in inputs)  # type: ignore[assignment]
        part, chosen, by, result = inputs
        layer = launches_for(
            signature, part.shape, part.stride(0), part.dtype, chosen.shape[1], chosen.dtype, by.dtype,
            StackKind.of(up), StackKind.of(down),
        )  # fmt: skip
        layer(part, chosen, by, up, down, result)
    return out


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """``x`` with its rows each in one piece, as kernels read them."""
    return x if x.stride(-1) == 1 else x.contiguous()


class ExpertsKey(NamedTuple):
    """What of a call its launches depend on."""

    signature: str
    shape: torch.Size
    stride: int
    dtype: torch.dtype
    top_k: int
    index_dtype: torch.dtype
    weights_dtype: torch.dtype
    up: StackKind
    down: StackKind


@lru_cache(maxsize=1024)
def launches_for(*given: object) -> OneToken | SeveralTokens:
    """The launches for what is :class:`ExpertsKey`."""
    all_given = ExpertsKey(*given)  # type: ignore[arg-type]
    form = ExpertsForm.parse(all_given.signature)
    has_form = all(
        has_vector_form(TiledLayout(spec).group(kind.scale_rows))
        for spec, kind in ((form.up, all_given.up), (form.down, all_given.down))
    )
    return (OneToken if all_given.shape[0] == 1 and has_form else SeveralTokens)(all_given, form)


class OneToken:
    """The launches for a single token: each of its experts has programs of its own."""

    def __init__(self, given: ExpertsKey, form: ExpertsForm):
        up, down, top_k = given.up, given.down, given.top_k
        inner = down.atoms * 128
        device = device_of(up.device)
        overlap = device.capability >= 90
        gathers = up.order is not None
        rows = InputRows(top_k, top_k, given.shape[1], given.stride)
        self._prepare = Preparation(rows, up, overlap, tokens=None)
        self._hidden = (top_k, inner)

        k, n = self._prepare.rows.k, inner * (1 + form.is_gated)
        tile = choose_vector(device, form.up.bits, n, up.atoms, top_k)
        tiles = -(-n // tile.rows)
        self._up_space = SplitSpace(up.device, tile.splits * top_k * n if tile.splits > 1 else 0, top_k * tiles)
        self._up = Launch(
            up_vector_kernel,
            (tiles, tile.splits, top_k),
            (up.experts, n, k, *up.sizes, k if gathers else 0, up.bias_width),
            (*up.constants(form.up, given.dtype), *formula_constants(form.activation, form.is_gated),
             k < up.atoms * 128, gathers and overlap, overlap, tile.rows, tile.unroll, tile.splits, top_k),
            tile.options(gathers and overlap),
        )  # fmt: skip

        n = given.shape[1]
        tile = choose_vector(device, form.down.bits, n, down.atoms, top_k)
        tiles = -(-n // tile.rows)
        self._down_space = SplitSpace(down.device, tile.splits * top_k * n, tiles)
        self._down = Launch(
            down_vector_kernel,
            (tiles, tile.splits, top_k),
            (down.experts, n, inner, *down.sizes, down.bias_width),
            (*down.constants(form.down, given.dtype), overlap, tile.rows, tile.unroll, tile.splits, top_k),
            tile.options(overlap),
        )

    def __call__(
        self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, up: Stack, down: Stack, out: torch.Tensor
    ) -> None:
        """Write the layer's output."""
        x = self._prepare(x, index, up.order).x
        hidden = x.new_empty(self._hidden)
        self._up(x, index, *up.weights, *up.biases, hidden, *self._up_space(up))
        self._down(hidden, index, weights, *down.weights, down.biases[0], out, *self._down_space(down))


class SeveralTokens:
    """The launches for more: the slots of each expert in tiles."""

    def __init__(self, given: ExpertsKey, form: ExpertsForm):
        (tokens, n), up, down = given.shape, given.up, given.down
        slots, inner = tokens * given.top_k, down.atoms * 128
        overlap = device_of(up.device).capability >= 90
        rows = InputRows(slots, given.top_k, n, given.stride)
        self._prepare = Preparation(rows, up, overlap, choose_tokens(slots, up.experts))
        self._hidden = (slots, inner)
        wide = inner * (1 + form.is_gated)
        tile = matrix_tile(slots, up, form.up.bits, wide)
        self._up = MatrixProduct(
            self._prepare.rows, up, form.up, given.dtype, tile, wide, wide, overlap, form.activation, form.is_gated
        )
        tile = matrix_tile(slots, down, form.down.bits, n)
        self._down = MatrixProduct(InputRows(slots, 1, inner, inner), down, form.down, given.dtype, tile, n, n, overlap)
        self._summands = (tile.splits, slots, n)
        # Sums in the activations' dtype suffice where nothing is to be added to them but other experts' outputs.
        self._dtype = torch.float32 if tile.splits > 1 else given.dtype
        block = 256 if tokens <= 64 else 1024
        self._sum = Launch(
            weighted_sum_kernel,
            (tokens, -(-n // block), 1),
            (slots, n, down.experts, down.bias_width),
            (down.bias is not None, overlap, block, tile.splits, given.top_k),
            (("num_warps", 4), ("launch_pdl", True)) if overlap else (("num_warps", 4),),
        )

    def __call__(
        self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, up: Stack, down: Stack, out: torch.Tensor
    ) -> None:
        """Write the layer's output."""
        prepared = self._prepare(x, index, up.order)
        hidden = x.new_empty(self._hidden)
        self._up(prepared, up, hidden)
        summands = torch.empty(self._summands, dtype=self._dtype, device=x.device)
        self._down(Prepared(hidden, *prepared[1:]), down, summands)
        self._sum(summands, index, weights, down.biases[0], out)


_library.impl("tiled_experts", tiled_experts, "CompositeExplicitAutograd")


@torch.library.register_fake("graftq::tiled_experts", lib=_library)
def _(x: torch.Tensor, *arguments: object) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
