"""The launches that the experts' operators consist of, each prepared once for the shapes of its arguments.

:class:`Preparation` routes and gathers, :class:`MatrixProduct` multiplies many slots. :class:`StackKind` is what a
launch depends on of a stack, besides its tensors' addresses.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from graftq.quant_linear.activations import Activation
from graftq.quant_linear.gpu.devices import device_of, program_for
from graftq.quant_linear.gpu.experts.tile_heuristics import (
    choose_matrix,
    choose_sweep,
    choose_tokens,
    slots_per_expert,
    tiles_bound,
)
from graftq.quant_linear.gpu.split_counters import counters
from graftq.quant_linear.gpu.tile_heuristics import Tile
from graftq.quant_linear.gpu.tiled_layout import TiledLayout
from graftq.quant_linear.kernels.experts_gemm import experts_matrix_kernel
from graftq.quant_linear.kernels.experts_prepare import prepare_kernel
from graftq.quant_linear.kernels.launch import Launch
from graftq.quant_linear.spec import QuantSpec


class Stack(NamedTuple):
    """The tensors of one product of all E experts, from ``TiledExpertsLayout``, in the operators' order of arguments.

    Attributes:
        codes: int16 [E, tiles, atoms, words].
        high: int16 [E, tiles, atoms, 512], 3 bits only.
        scales: [E, groups, 64 * tiles].
        zeros: int16, like ``scales``; None if all experts are symmetric.
        order: int32 [E, parts, 128 * atoms]: the input row at each place; None if no rows have moved.
        columns: int32 [E, 64 * tiles]: the column of ``bias`` for each row; None if they are the same.
        bias: [E, columns], the checkpoint's or the model's own; None if there is none.
    """

    codes: Tensor
    high: Tensor | None
    scales: Tensor
    zeros: Tensor | None
    order: Tensor | None
    columns: Tensor | None
    bias: Tensor | None

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """Codes, high, scales and zeros; any other tensor for one that is absent, which the kernels do not read."""
        codes, high, scales, zeros = self[:4]
        return codes, codes if high is None else high, scales, codes if zeros is None else zeros

    @property
    def biases(self) -> tuple[Tensor, Tensor]:
        """Bias and columns, likewise."""
        return self.scales if self.bias is None else self.bias, self.codes if self.columns is None else self.columns


class StackKind(NamedTuple):
    """All that a launch depends on of a stack but the tensors' addresses.

    Attributes:
        codes: Shape of ``codes``: experts, tiles of 64 output rows, atoms of 128 input rows, words of an atom.
        scale_rows: Rows of an expert's ``scales``.
        scale_dtype: Kernels are compiled for it.
        device: Of all tensors.
        is_symmetric: Whether there are no ``zeros``.
        order: Shape of ``order``; None if no rows have moved.
        bias: Width and dtype of ``bias``; None if there is none.
    """

    codes: torch.Size
    scale_rows: int
    scale_dtype: torch.dtype
    device: torch.device
    is_symmetric: bool
    order: torch.Size | None
    bias: tuple[int, torch.dtype] | None

    @staticmethod
    def of(stack: Stack) -> StackKind:
        """The kind of these tensors."""
        codes, _, scales, zeros, order, _, bias = stack
        fields = (
            codes.shape,
            scales.shape[1],
            scales.dtype,
            codes.device,
            zeros is None,
            None if order is None else order.shape,
            None if bias is None else (bias.shape[1], bias.dtype),
        )
        return tuple.__new__(StackKind, fields)

    @property
    def experts(self) -> int:
        """Experts of the layer."""
        return self.codes[0]

    @property
    def atoms(self) -> int:
        """Atoms of 128 input rows."""
        return self.codes[2]

    @property
    def bias_width(self) -> int:
        """Columns of the bias, 0 if there is none."""
        return 0 if self.bias is None else self.bias[0]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """``atoms``, ``groups`` and ``tiles_n`` of the kernels."""
        return self.atoms, self.scale_rows, self.codes[1]

    def constants(self, spec: QuantSpec, dtype: torch.dtype) -> tuple[object, ...]:
        """BITS, GROUP, SYM, PROGRAM and HAS_BIAS for activations of ``dtype``."""
        program = program_for(self.device, spec.bits, dtype, self.is_symmetric)
        return spec.bits, TiledLayout(spec).group(self.scale_rows), self.is_symmetric, program, self.bias is not None


def formula_constants(activation: Activation | None, is_gated: bool) -> tuple[object, ...]:
    """ACTIVATION, ALPHA, LIMIT and GATED; an empty name if the product has no activation."""
    if activation is None:
        return "", 0.0, 0.0, False
    return activation.name, activation.alpha, activation.limit, is_gated


class SplitSpace:
    """The partial sums and arrival counters that a launch needs for its splits of K.

    Args:
        device: Where it runs.
        partials: float32 partial sums; 0 if there is one split.
        arrivals: Counters.
    """

    def __init__(self, device: torch.device, partials: int, arrivals: int):
        self._device = device
        self._partials = partials
        self._arrivals = arrivals

    def __call__(self, stack: Stack) -> tuple[Tensor, Tensor]:
        """For a launch on the current stream; any tensors of ``stack`` if it needs none."""
        if not self._partials:
            return stack.scales, stack.codes
        partials = torch.empty(self._partials, dtype=torch.float32, device=self._device)
        return partials, counters(self._device, self._arrivals)


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


class Prepared(NamedTuple):
    """What a preparation returns.

    Attributes:
        x: The activations, gathered if there is an order.
        slots: int32 [tiles * tokens], if it routed: the slots of each tile (``slots`` of ``prepare_kernel``).
        tile_expert: int32 [tiles], if it routed: the expert of each tile.
    """

    x: Tensor
    slots: Tensor
    tile_expert: Tensor


class Preparation:
    """Sorts slots into tiles of one expert each, and gathers activations into packed order: one launch, or none.

    Args:
        rows: The activations before.
        kind: The stack that will read them; they are gathered if it has an order.
        overlap: Whether the next kernel may start before the launch ends.
        tokens: Slots in a tile; None if the product needs no tiles.

    Attributes:
        rows: The activations afterwards.
    """

    def __init__(self, rows: InputRows, kind: StackKind, overlap: bool, tokens: int | None):
        slots, experts = rows.slots, kind.experts
        parts = places = 0
        self._gathered: tuple[int, ...] | None = None
        self.rows = rows
        if kind.order is not None:
            parts, places = kind.order[1:]
            self._gathered = (slots, parts, places)
            self.rows = InputRows(slots, 1, places, parts * places, places)
        self._tiles = 0 if tokens is None else tiles_bound(slots, experts, tokens)
        self._tokens = tokens or 0
        block = 256 if slots <= 64 else 1024
        blocks = -(-places // block)
        programs = experts * (tokens is not None) + slots * parts * blocks
        self._launch: Launch | None = None
        if programs:
            chunk = min(1024, max(16, 1 << (slots - 1).bit_length()))
            self._launch = Launch(
                prepare_kernel,
                (programs, 1, 1),
                (slots, rows.k, places, parts, blocks, rows.share, experts, self._tiles, rows.stride),
                (tokens is not None, self._tokens, chunk, block, overlap),
                (("num_warps", 4),),
            )

    def __call__(self, x: Tensor, index: Tensor, order: Tensor | None) -> Prepared:
        """For activations ``x`` that the rows describe, and ``index``, contiguous, with the expert of each slot."""
        gathered = x if self._gathered is None else x.new_empty(self._gathered)
        routed = tile_expert = index  # any tensor
        if self._tiles:
            routed = torch.empty(self._tiles * (self._tokens + 1), dtype=torch.int32, device=x.device)
            tile_expert = routed[self._tiles * self._tokens :]
        if self._launch is not None:
            self._launch(x, index, index if order is None else order, gathered, routed, tile_expert)
        return Prepared(gathered, routed, tile_expert)


def matrix_tile(slots: int, kind: StackKind, bits: int, n: int) -> Tile:
    """The tile of a product with ``n`` output rows for ``slots`` slots."""
    device = device_of(kind.device)
    tokens = choose_tokens(device, slots, kind.experts)
    per_atom = max(1, -(-kind.scale_rows // kind.atoms))
    return choose_matrix(device, bits, n, kind.atoms, slots, kind.experts, tokens, per_atom)


class MatrixProduct:
    """One launch of ``experts_matrix_kernel``.

    Args:
        rows: The activations.
        kind: The stack.
        spec: Of one of the stack's projections.
        dtype: Of the activations.
        tile: From :func:`matrix_tile`.
        n: Output rows.
        part_rows: Output rows of one part of the stack, whose parts may each read their own part of the activations.
        overlap: Whether the kernel may start before the one before it ends.
        activation: The product's last step; with None each split's sum is an output.
        is_gated: Whether the activation takes gate and up rows.
    """

    def __init__(
        self,
        rows: InputRows,
        kind: StackKind,
        spec: QuantSpec,
        dtype: torch.dtype,
        tile: Tile,
        n: int,
        part_rows: int,
        overlap: bool,
        activation: Activation | None = None,
        is_gated: bool = False,
    ):
        slots, experts = rows.slots, kind.experts
        tiles_m = tiles_bound(slots, experts, tile.tokens)
        tiles = tiles_m * -(-n // tile.rows)
        needs_space = activation is not None and tile.splits > 1
        self._space = SplitSpace(kind.device, tile.splits * slots * n if needs_space else 0, tiles)
        mean = slots_per_expert(slots, experts)
        self._launch = Launch(
            experts_matrix_kernel,
            (tiles, tile.splits, 1),
            (slots, n, rows.k, *kind.sizes, tiles_m, rows.stride, rows.share, part_rows, rows.part_stride,
             kind.bias_width),
            (*kind.constants(spec, dtype), *formula_constants(activation, is_gated), rows.k < kind.atoms * 128,
             tile.scale_weights, mean > tile.tokens, overlap, tile.rows, tile.tokens, tile.unroll, tile.splits,
             choose_sweep(slots, experts, tile.tokens)),
            tile.options(overlap),
        )  # fmt: skip

    def __call__(self, prepared: Prepared, stack: Stack, out: Tensor) -> None:
        """Write ``out``: [slots, n / 2] with a gated activation, [slots, n] with another, else [splits, slots, n]."""
        x, routed, tile_expert = prepared
        self._launch(x, *stack.weights, *stack.biases, routed, tile_expert, out, *self._space(stack))
