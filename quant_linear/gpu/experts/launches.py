"""The launches that experts' operators consist of, each settled once for the shapes of its arguments.

``Preparation`` routes and gathers, ``MatrixProduct`` is one product of many slots. What a product depends on besides
its tensors' addresses is a :class:`StackKind` of stack.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

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
    """The tensors of one product of all experts, from ``TiledExpertsLayout``, in the operators' order of arguments.

    ``bias`` [experts, columns] may be the model's own; ``columns`` None means that rows are columns.
    """

    codes: torch.Tensor
    high: torch.Tensor | None
    scales: torch.Tensor
    zeros: torch.Tensor | None
    order: torch.Tensor | None
    columns: torch.Tensor | None
    bias: torch.Tensor | None

    @property
    def weights(self) -> tuple[torch.Tensor, ...]:
        """Codes, high, scales and zeros; for what is absent any tensor: the kernels do not touch it."""
        codes, high, scales, zeros = self[:4]
        return codes, codes if high is None else high, scales, codes if zeros is None else zeros

    @property
    def biases(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Bias and columns, likewise."""
        return self.scales if self.bias is None else self.bias, self.codes if self.columns is None else self.columns


class StackKind(NamedTuple):
    """What of a stack its launches depend on."""

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
        return StackKind(
            codes.shape,
            scales.shape[1],
            scales.dtype,
            codes.device,
            zeros is None,
            None if order is None else order.shape,
            None if bias is None else (bias.shape[1], bias.dtype),
        )

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
    """ACTIVATION, ALPHA, LIMIT and GATED; an empty name for a bare product."""
    if activation is None:
        return "", 0.0, 0.0, False
    return activation.name, activation.alpha, activation.limit, is_gated


class SplitSpace:
    """Partial sums and arrival counters of a launch; any tensors if it needs none."""

    def __init__(self, device: torch.device, partials: int, arrivals: int):
        self._device = device
        self._partials = partials
        self._arrivals = arrivals

    def __call__(self, stack: Stack) -> tuple[torch.Tensor, torch.Tensor]:
        """For a launch on the current stream."""
        if not self._partials:
            return stack.scales, stack.codes
        partials = torch.empty(self._partials, dtype=torch.float32, device=self._device)
        return partials, counters(self._device, self._arrivals)


class InputRows(NamedTuple):
    """Activations as a product reads them: ``slots`` rows, each of ``share`` slots that follow one another.

    Attributes:
        slots: Tokens times experts of each.
        share: Slots that read the same row.
        k: Input rows that there are, less than a whole atom's if nothing was gathered.
        stride: Elements from one row to the next.
        part_stride: Elements from one part of a row to the next, 0 if there are no parts.
    """

    slots: int
    share: int
    k: int
    stride: int
    part_stride: int = 0


class Prepared(NamedTuple):
    """What a preparation leaves behind: activations, and the tiles as in ``prepare_kernel``, if it routed."""

    x: torch.Tensor
    slots: torch.Tensor
    tile_expert: torch.Tensor


class Preparation:
    """Routes in tiles of ``tokens`` (unless None), and gathers if there is an order: one launch, or none.

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

    def __call__(self, x: torch.Tensor, index: torch.Tensor, order: torch.Tensor | None) -> Prepared:
        """For ``x`` as the rows given say, ``index`` [slots] in one piece."""
        gathered = x if self._gathered is None else x.new_empty(self._gathered)
        routed = tile_expert = index  # any tensor
        if self._tiles:
            routed = torch.empty(self._tiles * (self._tokens + 1), dtype=torch.int32, device=x.device)
            tile_expert = routed[self._tiles * self._tokens :]
        if self._launch is not None:
            self._launch(x, index, index if order is None else order, gathered, routed, tile_expert)
        return Prepared(gathered, routed, tile_expert)


def matrix_tile(slots: int, kind: StackKind, bits: int, n: int) -> Tile:
    """The tile for ``n`` output rows of so many slots."""
    tokens = choose_tokens(slots, kind.experts)
    return choose_matrix(device_of(kind.device), bits, n, kind.atoms, slots, kind.experts, tokens)


class MatrixProduct:
    """``experts_matrix_kernel`` for ``n`` output rows, of which each ``part_rows`` multiply the same part of the input.

    With an activation it is in the last step; without one, each split's sum is an output.
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

    def __call__(self, prepared: Prepared, stack: Stack, out: torch.Tensor) -> None:
        """``out`` as in the kernel."""
        x, routed, tile_expert = prepared
        self._launch(x, *stack.weights, *stack.biases, routed, tile_expert, out, *self._space(stack))
