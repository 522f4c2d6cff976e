"""The experts of a layer as one operator of ``torch.ops.graftq``, for ``torch.compile`` and CUDA graphs.

``tiled_experts`` runs the pipeline that this folder's docstring shows, and never waits for the device. Sums are taken
in float32 and in a fixed order, so that every run gives the same bits.

With few tokens a layer costs the time to read the weights of the chosen experts (``docs/performance.md``). So each
expert's weights are read once, and the rest is kept to few launches without another pass over the activations: routing
shares a launch with the gathering, ``down_proj``'s act-order is built into the layout of ``up``, bias and activation
are the last step of the first product, and partial sums over K are added up by the kernel that reads them next. On
Hopper each kernel starts while the one before it ends (programmatic dependent launch), and waits before it reads or
overwrites what that one may still be using.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from graftq.quant_linear.experts_spec import ExpertsForm
from graftq.quant_linear.gpu.devices import device_of
from graftq.quant_linear.gpu.dispatch_bypass import on_its_device
from graftq.quant_linear.gpu.experts.launches import (
    InputRows,
    MatrixProduct,
    Preparation,
    PreparedRows,
    formula_constants,
    matrix_tile,
)
from graftq.quant_linear.gpu.experts.stacks import (
    Stack,
    StackKind,
    column_name,
    stack_names,
)
from graftq.quant_linear.gpu.experts.tile_heuristics import (
    TOKENS_AT_ONCE,
    choose_tokens,
    choose_vector,
    has_vector_form,
)
from graftq.quant_linear.gpu.operands import SplitSpace, bias_name, weight_names
from graftq.quant_linear.gpu.tiled_layout import TiledLayout
from graftq.quant_linear.kernels.experts_gemv import down_vector_kernel, up_vector_kernel
from graftq.quant_linear.kernels.experts_sum import weighted_sum_kernel
from graftq.quant_linear.kernels.launch import Launch, LaunchSequence, Part


def stack_schema(prefix: str) -> str:
    """The tensors of a :class:`Stack` as arguments of an operator, in its order, each name with the prefix."""
    tensors = ("codes", "high?", "scales", "zeros?", "order?", "columns?", "bias?")
    return ", ".join(f"Tensor{'?' if name.endswith('?') else ''} {prefix}{name.rstrip('?')}" for name in tensors)


# The operator exists as long as this object does. "FRAGMENT", since several modules define operators of `graftq`.
_library = torch.library.Library("graftq", "FRAGMENT")
_library.define(
    f"tiled_experts(Tensor x, Tensor index, Tensor weights, {stack_schema('up_')}, {stack_schema('down_')}, "
    "str signature) -> Tensor"
)


@on_its_device
def tiled_experts(
    x: Tensor, index: Tensor, weights: Tensor,
    up_codes: Tensor, up_high: Tensor | None, up_scales: Tensor, up_zeros: Tensor | None,
    up_order: Tensor | None, up_columns: Tensor | None, up_bias: Tensor | None,
    down_codes: Tensor, down_high: Tensor | None, down_scales: Tensor, down_zeros: Tensor | None,
    down_order: Tensor | None, down_columns: Tensor | None, down_bias: Tensor | None,
    signature: str,
) -> Tensor:  # fmt: skip
    """The layer's output [T, H], contiguous, in the dtype of ``x``.

    Args:
        x: fp16 or bf16 [T, H], any strides.
        index: Integers [T, top_k]: the experts of each token. Entries that are no expert's number add nothing.
        weights: [T, top_k], any float dtype: the router's weight of each of them.
        up_codes, ..., up_bias: The first stack, gate and up, in the fused form of ``TiledExpertsLayout``.
        down_codes, ..., down_bias: The second stack.
        signature: ``ExpertsSpec.signature``.
    """
    up = Stack(up_codes, up_high, up_scales, up_zeros, up_order, up_columns, up_bias)
    down = Stack(down_codes, down_high, down_scales, down_zeros, down_order, down_columns, down_bias)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if index.numel() == 0:
        return out.zero_()
    x, index, weights = rows_of(x), index.contiguous(), weights.contiguous()
    chunks: Iterable[tuple[Tensor, Tensor, Tensor, Tensor]] = [(x, index, weights, out)]
    if x.shape[0] > TOKENS_AT_ONCE:
        chunks = zip(*(tensor.split(TOKENS_AT_ONCE) for tensor in (x, index, weights, out)), strict=True)
    for x, index, weights, result in chunks:
        launches_for(ExpertsKey.of(x, index, weights, up, down, signature)).run(x, index, weights, up, down, result)
    return out


def rows_of(x: Tensor) -> Tensor:
    """``x`` [rows, K] with each row contiguous, as kernels read them."""
    return x if x.stride(-1) == 1 else x.contiguous()


class ExpertsKey(NamedTuple):
    """All that the launches of a call depend on but the tensors' addresses; calls with equal keys share them.

    Attributes:
        signature: ``ExpertsSpec.signature``.
        shape: Of the activations, [T, H].
        stride: Elements from one row of the activations to the next.
        dtype: Of the activations.
        top_k: Experts of a token.
        index_dtype: Of the experts' numbers; kernels are compiled for it.
        weights_dtype: Of the router's weights, likewise.
        up, down: The kinds of both stacks.
    """

    signature: str
    shape: torch.Size
    stride: int
    dtype: torch.dtype
    top_k: int
    index_dtype: torch.dtype
    weights_dtype: torch.dtype
    up: StackKind
    down: StackKind

    @staticmethod
    def of(x: Tensor, index: Tensor, weights: Tensor, up: Stack, down: Stack, signature: str) -> ExpertsKey:
        """The key of a call of :func:`tiled_experts`, for no more than ``TOKENS_AT_ONCE`` tokens.

        Every call builds one: ``tuple.__new__`` takes half the time of the class's own constructor.
        """
        fields = (
            signature,
            x.shape,
            x.stride()[0],
            x.dtype,
            index.shape[1],
            index.dtype,
            weights.dtype,
            StackKind.of(up),
            StackKind.of(down),
        )
        return tuple.__new__(ExpertsKey, fields)


@lru_cache(maxsize=1024)
def launches_for(key: ExpertsKey) -> OneToken | SeveralTokens:
    """The launches of the calls that have this key."""
    form = ExpertsForm.parse(key.signature)
    fits_vector_kernels = all(
        has_vector_form(TiledLayout(spec).group(kind.scale_rows))
        for spec, kind in ((form.up, key.up), (form.down, key.down))
    )
    return (OneToken if key.shape[0] == 1 and fits_vector_kernels else SeveralTokens)(key, form)


_TENSORS = ("x", "index", "weights", *stack_names("up_"), *stack_names("down_"), "out", "up_arrivals", "down_arrivals")


class OneToken:
    """The launches for a single token: nothing to route, each of its experts has programs of its own.

    Up to three: gathering (act-order only), ``up_vector_kernel`` and ``down_vector_kernel``.
    """

    def __init__(self, key: ExpertsKey, form: ExpertsForm):
        up, down, top_k = key.up, key.down, key.top_k
        inner = down.atoms * 128
        device = device_of(up.device)
        overlap = device.capability >= 90
        gathers = up.order is not None
        rows = InputRows(top_k, top_k, key.shape[1], key.stride)
        prepare = Preparation(rows, up, "up_", key.dtype, overlap, tokens=None)
        self._device = up.device

        k, n = prepare.output.rows.k, inner * (1 + form.is_gated)
        tile = choose_vector(device, form.up.bits, n, up.atoms, top_k)
        tiles = -(-n // tile.rows)
        self._up_space = SplitSpace.of("up_", tile.splits * top_k * n if tile.splits > 1 else 0, top_k * tiles)
        multiply_up = Launch(
            up_vector_kernel,
            (tiles, tile.splits, top_k),
            (up.experts, n, k, *up.sizes, k if gathers else 0, up.bias_width),
            (*up.constants(form.up, key.dtype), *formula_constants(form.activation, form.is_gated),
             k < up.atoms * 128, gathers and overlap, overlap, tile.rows, tile.unroll, tile.splits, top_k),
            tile.options(gathers and overlap),
        )  # fmt: skip

        n = key.shape[1]
        tile = choose_vector(device, form.down.bits, n, down.atoms, top_k)
        tiles = -(-n // tile.rows)
        self._down_space = SplitSpace.of("down_", tile.splits * top_k * n, tiles)
        multiply_down = Launch(
            down_vector_kernel,
            (tiles, tile.splits, top_k),
            (down.experts, n, inner, *down.sizes, down.bias_width),
            (*down.constants(form.down, key.dtype), overlap, tile.rows, tile.unroll, tile.splits, top_k),
            tile.options(overlap),
        )
        up_weights = weight_names("up_", form.up.bits, up.is_symmetric)
        up_operands = (*up_weights, bias_name("up_", up.bias is not None), column_name("up_", up), "hidden")
        down_weights = weight_names("down_", form.down.bits, down.is_symmetric)
        down_operands = (*down_weights, bias_name("down_", down.bias is not None), "out")
        parts = {"hidden": Part(top_k * inner, key.dtype), **self._up_space.parts, **self._down_space.parts}
        steps = (
            *prepare.steps,
            (multiply_up, (prepare.output.x, "index", *up_operands, *self._up_space.names)),
            (multiply_down, ("hidden", "index", "weights", *down_operands, *self._down_space.names)),
        )
        self._launches = LaunchSequence(_TENSORS, prepare.parts | parts, steps)

    def run(self, x: Tensor, index: Tensor, weights: Tensor, up: Stack, down: Stack, out: Tensor) -> None:
        """Write the layer's output [T, H] to ``out``; arguments as for :func:`tiled_experts`, rows contiguous."""
        arrivals = self._up_space.counters(self._device), self._down_space.counters(self._device)
        self._launches(x, index, weights, *up, *down, out, *arrivals)


class SeveralTokens:
    """The launches for several tokens, whose slots are sorted into tiles of one expert each.

    Four: ``prepare_kernel``, ``experts_matrix_kernel`` for up and for down, and ``weighted_sum_kernel``.
    """

    def __init__(self, key: ExpertsKey, form: ExpertsForm):
        (tokens, n), up, down = key.shape, key.up, key.down
        slots, inner = tokens * key.top_k, down.atoms * 128
        device = device_of(up.device)
        overlap = device.capability >= 90
        rows = InputRows(slots, key.top_k, n, key.stride)
        prepare = Preparation(rows, up, "up_", key.dtype, overlap, choose_tokens(device, slots, up.experts))
        self._device = up.device
        wide = inner * (1 + form.is_gated)
        tile = matrix_tile(slots, up, form.up.bits, wide)
        multiply_up = MatrixProduct(
            prepare.output, "hidden", up, "up_", form.up, key.dtype, tile, wide, wide, overlap, form.activation,
            form.is_gated,
        )  # fmt: skip
        self._up_space = multiply_up.space
        tile = matrix_tile(slots, down, form.down.bits, n)
        hidden = PreparedRows(InputRows(slots, 1, inner, inner), "hidden", prepare.output.routing)
        multiply_down = MatrixProduct(hidden, "summands", down, "down_", form.down, key.dtype, tile, n, n, overlap)
        block = 256 if tokens <= 64 else 1024
        add = Launch(
            weighted_sum_kernel,
            (tokens, -(-n // block), 1),
            (slots, n, down.experts, down.bias_width),
            (down.bias is not None, overlap, block, tile.splits, key.top_k),
            (("num_warps", 4), ("launch_pdl", True)) if overlap else (("num_warps", 4),),
        )
        parts = {
            "hidden": Part(slots * inner, key.dtype),
            # Without splits a sum over K is complete, and may be rounded to the activations' dtype.
            "summands": Part(tile.splits * slots * n, torch.float32 if tile.splits > 1 else key.dtype),
        }
        sum_operands = ("summands", "index", "weights", bias_name("down_", down.bias is not None), "out")
        self._launches = LaunchSequence(
            _TENSORS,
            prepare.parts | parts | self._up_space.parts,
            (*prepare.steps, multiply_up.step, multiply_down.step, (add, sum_operands)),
        )

    def run(self, x: Tensor, index: Tensor, weights: Tensor, up: Stack, down: Stack, out: Tensor) -> None:
        """Write the layer's output [T, H] to ``out``; arguments as for :func:`tiled_experts`, rows contiguous."""
        self._launches(x, index, weights, *up, *down, out, self._up_space.counters(self._device), None)


_library.impl("tiled_experts", tiled_experts, "CompositeExplicitAutograd")


@torch.library.register_fake("graftq::tiled_experts", lib=_library)
def _(
    x: Tensor, index: Tensor, weights: Tensor,
    up_codes: Tensor, up_high: Tensor | None, up_scales: Tensor, up_zeros: Tensor | None,
    up_order: Tensor | None, up_columns: Tensor | None, up_bias: Tensor | None,
    down_codes: Tensor, down_high: Tensor | None, down_scales: Tensor, down_zeros: Tensor | None,
    down_order: Tensor | None, down_columns: Tensor | None, down_bias: Tensor | None,
    signature: str,
) -> Tensor:  # fmt: skip
    return torch.empty_like(x, memory_format=torch.contiguous_format)
