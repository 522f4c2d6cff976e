"""The launches that the experts' operators consist of, each prepared once for the shapes of its arguments.

:class:`Preparation` routes and gathers, :class:`MatrixProduct` multiplies many slots. Both say by name which tensors
and which parts of the workspace they take (``LaunchSequence``).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from graftq.quant_linear.activations import Activation
from graftq.quant_linear.gpu.devices import device_of
from graftq.quant_linear.gpu.experts.stacks import StackKind, column_name
from graftq.quant_linear.gpu.experts.tile_heuristics import (
    choose_matrix,
    choose_sweep,
    choose_tokens,
    slots_per_expert,
    tiles_bound,
)
from graftq.quant_linear.gpu.operands import SplitSpace, bias_name, weight_names
from graftq.quant_linear.gpu.tile_heuristics import Tile
from graftq.quant_linear.kernels.experts_gemm import experts_matrix_kernel
from graftq.quant_linear.kernels.experts_prepare import prepare_kernel
from graftq.quant_linear.kernels.launch import Launch, Part, Step
from graftq.quant_linear.spec import QuantSpec


def formula_constants(activation: Activation | None, is_gated: bool) -> tuple[object, ...]:
    """ACTIVATION, ALPHA, LIMIT and GATED; an empty name if the product has no activation."""
    if activation is None:
        return "", 0.0, 0.0, False
    return activation.name, activation.alpha, activation.limit, is_gated


class InputRows(NamedTuple):
    """How a product reads its activations: a slot is a token with one of its experts, and reads one row.

    Attributes:
        slots: Tokens times experts of each.
        share: Consecutive slots that read the same row.
        k: Elements of a row; fewer than the atoms hold if the rows were not gathered and K is no multiple of 128.
        stride: Elements from one row to the next.
        part_stride: Elements from one part of a row to the next; 0 if all parts of the stack read the same.
    """

    slots: int
    share: int
    k: int
    stride: int
    part_stride: int = 0


class PreparedRows(NamedTuple):
    """What a routed product reads besides its stack.

    Attributes:
        rows: The activations.
        x: Their name.
        routing: The names of the slots of each tile, int32 [tiles * tokens] (``slots`` of ``prepare_kernel``), and of
            its expert, int32 [tiles].
    """

    rows: InputRows
    x: str
    routing: tuple[str, str]


class Preparation:
    """Sorts slots into tiles of one expert each, and gathers activations into packed order: one launch, or none.

    It takes ``x``, the activations, ``index``, contiguous, with the expert of each slot, and the stack's ``order``.

    Args:
        rows: The activations before.
        kind: The stack that will read them; they are gathered if it has an order.
        prefix: Of the names of the stack's tensors.
        dtype: Of the activations.
        overlap: Whether the next kernel may start before the launch ends.
        tokens: Slots in a tile; None if the product needs no tiles.

    Attributes:
        output: What the product reads.
        parts: Of the workspace.
        steps: The launch and its operands, if there is one.
    """

    def __init__(
        self, rows: InputRows, kind: StackKind, prefix: str, dtype: torch.dtype, overlap: bool, tokens: int | None
    ):
        slots, experts = rows.slots, kind.experts
        parts = places = tiles = 0
        after, x, order = rows, "x", "index"  # any tensor
        routing = ("index", "index")
        self.parts: dict[str, Part] = {}
        if kind.order is not None:
            parts, places = kind.order[1:]
            after, x, order = InputRows(slots, 1, places, parts * places, places), "gathered", f"{prefix}order"
            self.parts[x] = Part(slots * parts * places, dtype)
        if tokens is not None:
            tiles = tiles_bound(slots, experts, tokens)
            routing = ("slots", "tile_expert")
            self.parts |= {"slots": Part(tiles * tokens, torch.int32), "tile_expert": Part(tiles, torch.int32)}
        block = 256 if slots <= 64 else 1024
        blocks = -(-places // block)
        programs = experts * (tokens is not None) + slots * parts * blocks
        self.output = PreparedRows(after, x, routing)
        self.steps: list[Step] = []
        if programs:
            chunk = min(1024, max(128, 1 << (slots - 1).bit_length()))  # an entry or more for each of 128 threads
            launch = Launch(
                prepare_kernel,
                (programs, 1, 1),
                (slots, rows.k, places, parts, blocks, rows.share, experts, tiles, rows.stride),
                (tokens is not None, tokens or 0, chunk, block, overlap),
                (("num_warps", 4),),
            )
            self.steps.append((launch, ("x", "index", order, x, *routing)))


def matrix_tile(slots: int, kind: StackKind, bits: int, n: int) -> Tile:
    """The tile of a product with ``n`` output rows for ``slots`` slots."""
    device = device_of(kind.device)
    tokens = choose_tokens(device, slots, kind.experts)
    per_atom = max(1, -(-kind.scale_rows // kind.atoms))
    return choose_matrix(device, bits, n, kind.atoms, slots, kind.experts, tokens, per_atom)


class MatrixProduct:
    """One launch of ``experts_matrix_kernel``.

    Args:
        prepared: The activations and the routing.
        out: The name of the output: [slots, n / 2] with a gated activation, [slots, n] with another, else
            [splits, slots, n].
        kind: The stack.
        prefix: Of the names of its tensors.
        spec: Of one of its projections.
        dtype: Of the activations.
        tile: From :func:`matrix_tile`.
        n: Output rows.
        part_rows: Output rows of one part of the stack, whose parts may each read their own part of the activations.
        overlap: Whether the kernel may start before the one before it ends.
        activation: The product's last step; with None each split's sum is an output.
        is_gated: Whether the activation takes gate and up rows.

    Attributes:
        space: What its splits of K need.
        step: The launch and its operands.
    """

    def __init__(
        self,
        prepared: PreparedRows,
        out: str,
        kind: StackKind,
        prefix: str,
        spec: QuantSpec,
        dtype: torch.dtype,
        tile: Tile,
        n: int,
        part_rows: int,
        overlap: bool,
        activation: Activation | None = None,
        is_gated: bool = False,
    ):
        rows, slots, experts = prepared.rows, prepared.rows.slots, kind.experts
        tiles_m = tiles_bound(slots, experts, tile.tokens)
        tiles = tiles_m * -(-n // tile.rows)
        needs_space = activation is not None and tile.splits > 1
        self.space = SplitSpace.of(prefix, tile.splits * slots * n if needs_space else 0, tiles)
        mean = slots_per_expert(slots, experts)
        launch = Launch(
            experts_matrix_kernel,
            (tiles, tile.splits, 1),
            (slots, n, rows.k, *kind.sizes, tiles_m, rows.stride, rows.share, part_rows, rows.part_stride,
             kind.bias_width, choose_sweep(slots, experts, tile.tokens)),
            (*kind.constants(spec, dtype), *formula_constants(activation, is_gated), rows.k < kind.atoms * 128,
             tile.scale_weights, mean > tile.tokens, overlap, tile.rows, tile.tokens, tile.unroll, tile.splits),
            tile.options(overlap),
        )  # fmt: skip
        columns = prefix + "codes" if activation is None else column_name(prefix, kind)
        weights = weight_names(prefix, spec.bits, kind.is_symmetric)
        biases = (bias_name(prefix, kind.bias is not None), columns)
        self.step: Step = (launch, (prepared.x, *weights, *biases, *prepared.routing, out, *self.space.names))
