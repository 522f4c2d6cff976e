"""The experts of a layer in tiles: two stacks of matrices, made so that one feeds the other without a detour.

*Fused* form: each 16 rows of the first stack are 8 of gate and the same 8 of up, so that one thread of the matrix
instruction has both, and the product's last step is the activation. The rows come in the order in which the second
stack wants its inputs: ``down_proj``'s act-order costs nothing.

*Split* form, where the activation has no name or gate and up do not share their act-order: one stored projection after
the other, rows as stored; the activation's result is gathered into ``down_proj``'s order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from graftq.quant_linear.experts_spec import ExpertsSpec
from graftq.quant_linear.gpu.experts.metadata import metadata_of, pack_metadata
from graftq.quant_linear.gpu.experts.row_map import StackRows
from graftq.quant_linear.gpu.split_counters import reserve
from graftq.quant_linear.gpu.tile_words import TILE_N, from_tiles, to_tiles
from graftq.quant_linear.gpu.tiled_layout import TiledLayout, stored_zeros
from graftq.quant_linear.layouts import GptqTensors, Packed
from graftq.quant_linear.row_order import RowOrder, can_multiply_as_one

PREFIX = "tiled_"
"""What the names of all packed tensors begin with; an experts module has names of its own."""

ExpertTensors = Mapping[str, GptqTensors]
"""One expert's tensors by projection."""


@dataclass(frozen=True)
class TiledForm:
    """How experts are arranged.

    Attributes:
        is_fused: Fused form rather than split.
        up_in_units: Whether the first stack's scales are stored per unit of 16 rows.
        down_in_units: Likewise the second's.
    """

    is_fused: bool
    up_in_units: bool
    down_in_units: bool


@dataclass(frozen=True)
class _RowRun:
    """A run of a stack's rows, a multiple of 128, whose input rows have the same order.

    Attributes:
        names: The projections that the rows come from.
        source: int64 [rows], for each row the column of these projections' stored tensors side by side, or -1.
        order: Where the input rows go.
        in_units: Whether scales are stored per unit.
    """

    names: tuple[str, ...]
    source: torch.Tensor
    order: RowOrder
    in_units: bool


@dataclass(frozen=True)
class TiledExpertsLayout:
    """Stacks ``up`` (gate and up) and ``down`` of :class:`TiledLayout`, E experts each.

    =================== ===================================== =========================================================
    tensor, "tiled\\_"+  shape                                 meaning
    =================== ===================================== =========================================================
    up_codes, up_high   int32 [E, tiles, atoms, ...]          as in :class:`TiledLayout`
    up_scales           [E, groups, 64 * tiles]               0 for rows of padding
    up_zeros            int32 [E, groups, 32 * tiles]         likewise, in pairs; if any expert is not symmetric
    up_order            int32 [E, parts, 128 * atoms]         input row at each place, if any expert's rows have moved;
                                                              one part if fused, else one per projection
    up_columns          int32 [E, 64 * tiles]                 fused form only: column of each row, as counted below
    up_bias             [E, columns]                          the checkpoint's, if it stores any; by column
    down\\_...           likewise, without columns             ``down_order`` [E, 1, 128 * atoms] in split form only
    qzeros, g_idx       int32 or int64 [...]                  as stored, all in a row, for :meth:`unpack` alone
    dtypes              int8 [E, projections, 3]              stored dtypes of scales, bias and g_idx, likewise
    =================== ===================================== =========================================================

    Columns are the activation's inputs (``[gate; up]``, or interleaved), then columns that the writer padded.
    Experts whose groups lie differently are padded to the longest.
    """

    spec: ExpertsSpec

    def pack(self, take: Callable[[str, int], GptqTensors]) -> Packed:
        """Repack, on the device the tensors are on, dropping each expert once it is done."""
        experts: list[ExpertTensors] = [
            {name: take(name, expert) for name in self.spec.names} for expert in range(self.spec.num_experts)
        ]
        reserve(experts[0][self.spec.names[0]].qweight.device)
        metadata = pack_metadata(self.spec, experts)
        form = TiledForm(
            self._can_fuse(experts),
            self._needs_units(self.rows.up_names, experts),
            self._needs_units(("down_proj",), experts),
        )
        up, down, packed = self._arrange(experts, form)
        for expert, runs in enumerate(zip(up, down, strict=True)):
            stored = experts[expert]
            experts[expert] = {}
            for stack, stack_runs in zip(("up", "down"), runs, strict=True):
                for name, tensor in self._pack_stack(stored, expert, stack_runs).items():
                    key = f"{PREFIX}{stack}_{name}"
                    if key not in packed:
                        packed[key] = tensor.new_empty(self.spec.num_experts, *tensor.shape)
                    # A dtype that holds every expert's, should they differ.
                    packed[key] = packed[key].to(torch.promote_types(packed[key].dtype, tensor.dtype))
                    packed[key][expert] = tensor
        return Packed(packed | {f"{PREFIX}{name}": tensor for name, tensor in metadata.items()}, form)

    def unpack(self, packed: Packed, name: str, expert: int) -> GptqTensors:
        """Restore one projection bit for bit."""
        form = packed.form
        assert isinstance(form, TiledForm)
        spec = self.spec.of(name)[expert]
        stack = "down" if name == "down_proj" else "up"
        metadata = metadata_of(self.spec, _below(packed, PREFIX), name, expert)
        own = {key: tensor[expert] for key, tensor in _below(packed, f"{PREFIX}{stack}_").items()}
        device = own["codes"].device
        in_units = form.down_in_units if stack == "down" else form.up_in_units
        order = TiledLayout(spec).row_order(metadata.g_idx, device, in_units).padded(own["codes"].shape[1] * 128)
        rows = self.rows.holding(name, expert, own["columns"] if form.is_fused and stack == "up" else None, device)
        first, last = (int(rows.min()) // TILE_N, int(rows.max()) // TILE_N + 1)
        tiles: dict[str, torch.Tensor] = {key: own[key][first:last] for key in ("codes", "high") if key in own}
        qweight = from_tiles(tiles, spec.bits, order, spec.packed_rows)
        scales = own["scales"][:, rows]
        if in_units:
            scales = scales[order.first_units(spec.num_groups)]
        bias = None
        if spec.has_bias:
            bias = own["bias"][self.rows.columns(name, expert)[: spec.stored_bias].to(device)].to(metadata.bias_dtype)
        return GptqTensors(
            qweight[:, rows - first * TILE_N].contiguous(),
            metadata.qzeros,
            scales.to(metadata.scale_dtype).contiguous(),
            metadata.g_idx,
            bias,
        )

    @property
    def rows(self) -> StackRows:
        """Which row holds what."""
        return StackRows(self.spec)

    def _can_fuse(self, experts: Sequence[ExpertTensors]) -> bool:
        """Whether the activation has a name, and each expert's gate and up read their input in the same order."""
        first, *others = self.rows.up_names
        return self.spec.activation is not None and all(
            can_multiply_as_one(
                self.spec.of(first)[expert], stored[first].g_idx, self.spec.of(other)[expert], stored[other].g_idx
            )
            for other in others
            for expert, stored in enumerate(experts)
        )

    def _needs_units(self, names: tuple[str, ...], experts: Sequence[ExpertTensors]) -> bool:
        """Whether any of the stack's projections has groups that no kernel knows; then all are stored in units."""
        return any(
            TiledLayout(self.spec.of(name)[expert]).needs_units(stored[name].g_idx)
            for name in names
            for expert, stored in enumerate(experts)
        )

    def _arrange(
        self, experts: Sequence[ExpertTensors], form: TiledForm
    ) -> tuple[list[list[_RowRun]], list[list[_RowRun]], dict[str, torch.Tensor]]:
        """Both stacks' runs of rows per expert, and the tensors that say how rows are ordered."""
        device = experts[0]["down_proj"].qweight.device
        down = self._row_orders(("down_proj",), experts, form.down_in_units)
        up = self._row_orders(self.rows.up_names, experts, form.up_in_units)
        orders = {"up": _stacked_orders([each[:1] if form.is_fused else each for each in up])}
        if not form.is_fused:
            orders["down"] = _stacked_orders(down)
        columns: list[torch.Tensor] = []
        up_runs: list[list[_RowRun]] = []
        for expert, each in enumerate(up):
            if form.is_fused:
                columns.append(self.rows.fused_columns(expert, down[expert][0], device))
                source = self.rows.fused_source(columns[-1], expert)
                up_runs.append([_RowRun(self.rows.up_names, source, each[0], form.up_in_units)])
            else:
                named = zip(self.rows.up_names, each, strict=True)
                up_runs.append([self._run(name, expert, order, form.up_in_units, device) for name, order in named])
        down_runs = [
            [self._run("down_proj", expert, each[0], form.down_in_units, device)] for expert, each in enumerate(down)
        ]
        packed = {f"{PREFIX}{stack}_order": order for stack, order in orders.items() if order is not None}
        if form.is_fused:
            packed[f"{PREFIX}up_columns"] = torch.stack(columns)
        return up_runs, down_runs, packed

    def _run(self, name: str, expert: int, order: RowOrder, in_units: bool, device: torch.device) -> _RowRun:
        """A projection by itself."""
        return _RowRun((name,), self.rows.split_source(name, expert, device), order, in_units)

    def _row_orders(
        self, names: tuple[str, ...], experts: Sequence[ExpertTensors], in_units: bool
    ) -> list[list[RowOrder]]:
        """The row orders of some projections of all experts, padded to the longest."""
        found = [
            [
                TiledLayout(self.spec.of(name)[expert]).row_order(
                    stored[name].g_idx, stored[name].qweight.device, in_units
                )
                for name in names
            ]
            for expert, stored in enumerate(experts)
        ]
        rows = max(order.rows for each in found for order in each)
        return [[order.padded(rows) for order in each] for each in found]

    def _pack_stack(self, stored: ExpertTensors, expert: int, runs: list[_RowRun]) -> dict[str, torch.Tensor]:
        """One expert's tensors of one stack, all but the order."""
        tiles: list[dict[str, torch.Tensor]] = []
        scales, zeros = [], []
        stack_names = tuple(name for run in runs for name in run.names)
        is_sym = all(spec.sym for name in stack_names for spec in self.spec.of(name))
        for run in runs:
            specs = {name: self.spec.of(name)[expert] for name in run.names}
            qweight = _side_by_side([stored[name].qweight for name in run.names])
            tiles.append(to_tiles(qweight, specs[run.names[0]].bits, run.order, run.source))
            real, source = run.source >= 0, run.source.clamp(min=0)
            rows = run.order.unit_group if run.in_units else slice(None)
            scale = _side_by_side([stored[name].scales for name in run.names])
            scales.append(torch.where(real, scale[:, source], 0)[rows])
            if not is_sym:
                zero = _side_by_side([stored_zeros(stored[name], spec) for name, spec in specs.items()])
                zeros.append(torch.where(real, zero[:, source], 0)[rows])
        packed = {name: torch.cat([tile[name] for tile in tiles]) for name in tiles[0]}
        packed["scales"] = _side_by_side(scales)
        if not is_sym:
            packed["zeros"] = _side_by_side(zeros).view(torch.int32)
        if any(spec.has_bias for name in stack_names for spec in self.spec.of(name)):
            packed["bias"] = self._bias(stored, expert, stack_names)
        return packed

    def _bias(self, stored: ExpertTensors, expert: int, names: tuple[str, ...]) -> torch.Tensor:
        """The checkpoint's biases of one expert's stack, by column; 0 where it stores none."""
        biases = {name: stored[name].bias for name in names}
        present = [bias for bias in biases.values() if bias is not None]
        total = sum(self.spec.of(name)[expert].padded_out for name in names)
        dtype = _side_by_side([bias[None] for bias in present]).dtype if present else torch.float16
        whole = torch.zeros(total, dtype=dtype, device=stored[names[0]].scales.device)
        for name, bias in biases.items():
            if bias is not None:
                whole[self.rows.columns(name, expert)[: len(bias)].to(whole.device)] = bias.to(dtype)
        return whole


def _stacked_orders(orders: Sequence[Sequence[RowOrder]]) -> torch.Tensor | None:
    """All experts' orders, int32 [E, parts, rows]; None if nothing moves anywhere."""
    if all(each.order is None for parts in orders for each in parts):
        return None
    moved = next(each.order for parts in orders for each in parts if each.order is not None)
    unmoved = torch.arange(len(moved), dtype=torch.int32, device=moved.device)
    return torch.stack(
        [torch.stack([unmoved if each.order is None else each.order for each in parts]) for parts in orders]
    )


def _side_by_side(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Concatenated along the last dimension, in a dtype that holds them all."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), -1)


def _below(packed: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose names begin so, by the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in packed.items() if name.startswith(prefix)}
