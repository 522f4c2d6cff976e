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

from typing import NamedTuple

import torch

from graftq.quant_linear.experts_tiles import (
    TOKENS_AT_ONCE,
    choose_matrix,
    choose_sweep,
    choose_tokens,
    choose_vector,
    has_vector_form,
    slots_per_expert,
    tiles_bound,
)
from graftq.quant_linear.kernels.experts_gemm import experts_matrix_kernel
from graftq.quant_linear.kernels.experts_gemv import down_vector_kernel, up_vector_kernel
from graftq.quant_linear.kernels.experts_prepare import prepare_kernel
from graftq.quant_linear.kernels.experts_sum import weighted_sum_kernel
from graftq.quant_linear.kernels.launch import launch
from graftq.quant_linear.ops import device_of, launch_options, program_for
from graftq.quant_linear.tiles import Tile
from graftq.quant_linear.workspace import counters


class Stack(NamedTuple):
    """One product of all experts: the tensors of ``TiledExpertsLayout``, then its numbers.

    ``bias`` [experts, columns] may be the model's own; ``columns`` None means that rows are columns.
    """

    codes: torch.Tensor
    high: torch.Tensor | None
    scales: torch.Tensor
    zeros: torch.Tensor | None
    order: torch.Tensor | None
    columns: torch.Tensor | None
    bias: torch.Tensor | None
    bits: int
    group: int


class Formula(NamedTuple):
    """``activations.Activation`` in the operators' order of arguments; an empty name for a bare product."""

    name: str
    alpha: float
    limit: float
    is_gated: bool


BARE = Formula("", 0.0, 0.0, False)


class Prepared(NamedTuple):
    """What ``prepare_kernel`` leaves behind.

    Attributes:
        x: Activations as the product reads them, [slots / share, parts, K] or [slots / share, K].
        k: Input rows that they have, less than a whole atom's if nothing was gathered.
        share: Slots that read the same row of ``x``.
        slots, tile_expert: The tiles, as in ``prepare_kernel``; if routed.
    """

    x: torch.Tensor
    k: int
    share: int
    slots: torch.Tensor
    tile_expert: torch.Tensor


def stack_schema(prefix: str) -> str:
    """The arguments of an operator that make a :class:`Stack`."""
    tensors = ("codes", "high?", "scales", "zeros?", "order?", "columns?", "bias?")
    named = [f"Tensor{'?' if name.endswith('?') else ''} {prefix}{name.rstrip('?')}" for name in tensors]
    return ", ".join([*named, f"int {prefix}bits", f"int {prefix}group"])


_library = torch.library.Library("graftq", "FRAGMENT")
_library.define(
    f"tiled_experts(Tensor x, Tensor index, Tensor weights, {stack_schema('up_')}, {stack_schema('down_')}, "
    "str activation, float alpha, float limit, bool is_gated) -> Tensor"
)


def _tiled_experts(x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, *arguments: object) -> torch.Tensor:
    """The layer's output [T, H] for ``x`` [T, H], fp16 or bf16. Arguments: the stacks up and down, the formula."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():  # Triton launches on the current device
        with torch.cuda.device(x.device):
            return _tiled_experts(x, index, weights, *arguments)
    size = len(Stack._fields)
    up, down = Stack(*arguments[:size]), Stack(*arguments[size : 2 * size])  # type: ignore[arg-type]
    formula = Formula(*arguments[2 * size :])  # type: ignore[arg-type]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if index.numel() == 0:
        return out.zero_()
    x, index, weights = rows_of(x), index.contiguous(), weights.contiguous()
    if x.shape[0] == 1 and has_vector_form(up.group) and has_vector_form(down.group):
        _one_token(x, index.view(-1), weights, up, down, formula, out)
        return out
    if x.shape[0] <= TOKENS_AT_ONCE:
        _several_tokens(x, index, weights, up, down, formula, out)
        return out
    for start in range(0, x.shape[0], TOKENS_AT_ONCE):
        part = slice(start, start + TOKENS_AT_ONCE)
        _several_tokens(x[part], index[part], weights[part], up, down, formula, out[part])
    return out


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """``x`` with its rows each in one piece, as kernels read them."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _one_token(
    x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, up: Stack, down: Stack, formula: Formula,
    out: torch.Tensor,
) -> None:  # fmt: skip
    top_k, (experts, stored, atoms) = index.shape[0], up.codes.shape[:3]
    inner = down.codes.shape[2] * 128
    n = inner * (1 + formula.is_gated)
    device = device_of(x.device)
    overlap = device.capability >= 90
    gathers = up.order is not None
    prepared = prepare(x, index, up, top_k, overlap, tokens=None)
    tile = choose_vector(device, up.bits, n, atoms, top_k)
    tiles = -(-n // tile.rows)
    hidden = x.new_empty(top_k, inner)
    partials, arrivals = _space(up, tile.splits * top_k * n, top_k * tiles, tile.splits > 1)
    launch(
        up_vector_kernel,
        (tiles, tile.splits, top_k),
        (prepared.x, index, *kernel_weights(up), _bias(up), _columns(up), hidden, partials, arrivals),
        (experts, n, prepared.k, atoms, up.scales.shape[1], stored, prepared.k if gathers else 0, _bias_width(up)),
        (*kernel_constants(up, x.dtype), *formula, prepared.k < atoms * 128, gathers and overlap, overlap,
         tile.rows, tile.unroll, tile.splits, top_k),
        launch_options(tile, gathers and overlap),
    )  # fmt: skip
    n, (_, stored, atoms) = out.shape[1], down.codes.shape[:3]
    tile = choose_vector(device, down.bits, n, atoms, top_k)
    tiles = -(-n // tile.rows)
    partials, arrivals = _space(down, tile.splits * top_k * n, tiles, True)
    launch(
        down_vector_kernel,
        (tiles, tile.splits, top_k),
        (hidden, index, weights, *kernel_weights(down), _bias(down), out, partials, arrivals),
        (experts, n, inner, atoms, down.scales.shape[1], stored, _bias_width(down)),
        (*kernel_constants(down, x.dtype), overlap, tile.rows, tile.unroll, tile.splits, top_k),
        launch_options(tile, overlap),
    )


def _several_tokens(
    x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, up: Stack, down: Stack, formula: Formula,
    out: torch.Tensor,
) -> None:  # fmt: skip
    (tokens, top_k), experts, n = index.shape, up.codes.shape[0], out.shape[1]
    index = index.view(-1)
    slots = index.shape[0]
    inner = down.codes.shape[2] * 128
    device = device_of(x.device)
    overlap = device.capability >= 90
    prepared = prepare(x, index, up, top_k, overlap, choose_tokens(slots, experts))
    hidden = x.new_empty(slots, inner)
    rows = inner * (1 + formula.is_gated)
    multiply(prepared, up, formula, matrix_tile(prepared, up, rows), rows, rows, hidden, overlap)
    prepared = prepared._replace(x=hidden, k=inner, share=1)
    tile = matrix_tile(prepared, down, n)
    # Sums in the activations' dtype suffice where nothing is to be added to them but other experts' outputs.
    dtype = torch.float32 if tile.splits > 1 else x.dtype
    summands = torch.empty(tile.splits, slots, n, dtype=dtype, device=x.device)
    multiply(prepared, down, BARE, tile, n, n, summands, overlap)
    block = 256 if tokens <= 64 else 1024
    launch(
        weighted_sum_kernel,
        (tokens, -(-n // block), 1),
        (summands, index, weights, _bias(down), out),
        (slots, n, experts, _bias_width(down)),
        (down.bias is not None, overlap, block, tile.splits, top_k),
        (("num_warps", 4), ("launch_pdl", True)) if overlap else (("num_warps", 4),),
    )


def prepare(
    x: torch.Tensor, index: torch.Tensor, stack: Stack, share: int, overlap: bool, tokens: int | None
) -> Prepared:
    """Route in tiles of ``tokens`` (unless None), and gather ``x`` [slots / share, K] if there is an order."""
    slots, experts, order = index.shape[0], stack.codes.shape[0], stack.order
    gathered, parts, places, k = x, 0, 0, x.shape[1]
    if order is not None:
        parts, places = order.shape[1:]
        gathered = x.new_empty(slots, parts, places)
    routed = tile_expert = index  # any tensor
    tiles = 0
    if tokens is not None:
        tiles = tiles_bound(slots, experts, tokens)
        routed, tile_expert = torch.empty(tiles * (tokens + 1), dtype=torch.int32, device=x.device).split(
            (tiles * tokens, tiles)
        )
    block = 256 if slots <= 64 else 1024
    blocks = -(-places // block)
    programs = experts * (tokens is not None) + slots * parts * blocks
    if programs:
        chunk = min(1024, max(16, 1 << (slots - 1).bit_length()))
        launch(
            prepare_kernel,
            (programs, 1, 1),
            (x, index, index if order is None else order, gathered, routed, tile_expert),
            (slots, k, places, parts, blocks, share, experts, tiles, x.stride(0)),
            (tokens is not None, tokens or 0, chunk, block, overlap),
            (("num_warps", 4),),
        )
    if order is not None:
        k, share = places, 1
    return Prepared(gathered, k, share, routed, tile_expert)


def matrix_tile(prepared: Prepared, stack: Stack, n: int) -> Tile:
    """The tile for ``n`` output rows of the slots that ``prepared`` has."""
    experts, _, atoms = stack.codes.shape[:3]
    slots = prepared.x.shape[0] * prepared.share
    device = device_of(stack.codes.device)
    return choose_matrix(device, stack.bits, n, atoms, slots, experts, choose_tokens(slots, experts))


def multiply(
    prepared: Prepared, stack: Stack, formula: Formula, tile: Tile, n: int, part_rows: int, out: torch.Tensor,
    overlap: bool,
) -> None:  # fmt: skip
    """``experts_matrix_kernel`` for ``n`` output rows; ``out`` as there."""
    x, k, share, routed, tile_expert = prepared
    experts, stored, atoms = stack.codes.shape[:3]
    slots, tiles_m = x.shape[0] * share, tile_expert.shape[0]
    tiles = tiles_m * -(-n // tile.rows)
    needs_space = formula.name != "" and tile.splits > 1
    partials, arrivals = _space(stack, tile.splits * slots * n, tiles, needs_space)
    mean = slots_per_expert(slots, experts)
    launch(
        experts_matrix_kernel,
        (tiles, tile.splits, 1),
        (x, *kernel_weights(stack), _bias(stack), _columns(stack), routed, tile_expert, out, partials, arrivals),
        (slots, n, k, atoms, stack.scales.shape[1], stored, tiles_m, x.stride(0), share, part_rows,
         x.stride(1) if x.dim() == 3 else 0, _bias_width(stack)),
        (*kernel_constants(stack, x.dtype), *formula, k < atoms * 128, tile.scale_weights, mean > tile.tokens, overlap,
         tile.rows, tile.tokens, tile.unroll, tile.splits, choose_sweep(slots, experts, tile.tokens)),
        launch_options(tile, overlap),
    )  # fmt: skip


def kernel_weights(stack: Stack) -> tuple[torch.Tensor, ...]:
    """Codes, high, scales and zeros; for what is absent any tensor: the kernels do not touch it."""
    codes, high, scales, zeros = stack[:4]
    return codes, codes if high is None else high, scales, codes if zeros is None else zeros


def _bias(stack: Stack) -> torch.Tensor:
    return stack.scales if stack.bias is None else stack.bias


def _bias_width(stack: Stack) -> int:
    return 0 if stack.bias is None else stack.bias.shape[1]


def _columns(stack: Stack) -> torch.Tensor:
    return stack.codes if stack.columns is None else stack.columns


def kernel_constants(stack: Stack, dtype: torch.dtype) -> tuple[object, ...]:
    """BITS, GROUP, SYM, PROGRAM and HAS_BIAS for activations of ``dtype``."""
    sym = stack.zeros is None
    program = program_for(stack.codes.device, stack.bits, dtype, sym)
    return stack.bits, stack.group, sym, program, stack.bias is not None


def _space(stack: Stack, partials: int, arrivals: int, needed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Partial sums and arrival counters; any tensors if not ``needed``."""
    device = stack.codes.device
    if not needed:
        return stack.scales, stack.codes
    return torch.empty(partials, dtype=torch.float32, device=device), counters(device, arrivals)


_library.impl("tiled_experts", _tiled_experts, "CompositeExplicitAutograd")


@torch.library.register_fake("graftq::tiled_experts", lib=_library)
def _(x: torch.Tensor, *arguments: object) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
