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
from graftq.quant_linear.gpu.experts.metadata import g_idx_on_host, metadata_of, pack_metadata
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

GroupIndices = Mapping[str, torch.Tensor | None]
"""One expert's ``g_idx`` by projection, on the CPU."""


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
    """A run of a stack's rows, a multiple of 128, whose input rows have the same order; of all E experts.

    Attributes:
        names: The projections that the rows come from.
        source: int64 [E, rows], for each row the column of these projections' stored tensors side by side, or -1.
        orders: Where each expert's input rows go.
        in_units: Whether scales are stored per unit.
    """

    names: tuple[str, ...]
    source: torch.Tensor
    orders: Sequence[RowOrder]
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
        g_idx = g_idx_on_host(self.spec, experts, metadata)
        form = TiledForm(
            self._can_fuse(g_idx),
            self._needs_units(self.rows.up_names, g_idx),
            self._needs_units(("down_proj",), g_idx),
        )
        up, down, packed = self._arrange(experts, form)
        stacks = {"up": up, "down": down}
        for stack, runs in stacks.items():
            packed |= {f"{PREFIX}{stack}_{name}": tensor for name, tensor in self._pack_small(experts, runs).items()}
        for expert in range(self.spec.num_experts):
            stored = experts[expert]
            experts[expert] = {}
            for stack, runs in stacks.items():
                for name, tensor in self._pack_codes(stored, expert, runs).items():
                    key = f"{PREFIX}{stack}_{name}"
                    if key not in packed:
                        packed[key] = tensor.new_empty(self.spec.num_experts, *tensor.shape)
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

    def _can_fuse(self, g_idx: Sequence[GroupIndices]) -> bool:
        """Whether the activation has a name, and each expert's gate and up read their input in the same order."""
        first, *others = self.rows.up_names
        return self.spec.activation is not None and all(
            can_multiply_as_one(self.spec.of(first)[expert], own[first], self.spec.of(other)[expert], own[other])
            for other in others
            for expert, own in enumerate(g_idx)
        )

    def _needs_units(self, names: tuple[str, ...], g_idx: Sequence[GroupIndices]) -> bool:
        """Whether any of the stack's projections has groups that no kernel knows; then all are stored in units."""
        return any(
            TiledLayout(self.spec.of(name)[expert]).needs_units(own[name])
            for name in names
            for expert, own in enumerate(g_idx)
        )

    def _arrange(
        self, experts: Sequence[ExpertTensors], form: TiledForm
    ) -> tuple[list[_RowRun], list[_RowRun], dict[str, torch.Tensor]]:
        """Both stacks' runs of rows, and the tensors that say how rows are ordered."""
        names = self.rows.up_names
        (down,) = self._row_orders(("down_proj",), experts, form.down_in_units)
        up = self._row_orders(names[:1] if form.is_fused else names, experts, form.up_in_units)
        up_order, down_order = _stacked_orders(up), _stacked_orders([down])
        tensors = {"up_order": up_order}
        if form.is_fused:
            value = _in_order(down)[None] if down_order is None else down_order[:, 0]
            tensors["up_columns"] = columns = self.rows.fused_columns(value.expand(len(experts), -1))
            up_runs = [_RowRun(names, self.rows.fused_source(columns), up[0], form.up_in_units)]
        else:
            tensors["down_order"] = down_order
            up_runs = [self._run(name, each, form.up_in_units) for name, each in zip(names, up, strict=True)]
        packed = {f"{PREFIX}{name}": tensor for name, tensor in tensors.items() if tensor is not None}
        return up_runs, [self._run("down_proj", down, form.down_in_units)], packed

    def _run(self, name: str, orders: Sequence[RowOrder], in_units: bool) -> _RowRun:
        """A projection by itself."""
        source = self.rows.split_source(name, orders[0].unit_group.device)
        return _RowRun((name,), source.expand(len(orders), -1), orders, in_units)

    def _row_orders(
        self, names: tuple[str, ...], experts: Sequence[ExpertTensors], in_units: bool
    ) -> list[list[RowOrder]]:
        """The row orders of some projections, of all experts each, padded to the longest."""
        found = [
            TiledLayout.row_orders(
                self.spec.of(name),
                [stored[name].g_idx for stored in experts],
                experts[0][name].qweight.device,
                in_units,
            )
            for name in names
        ]
        rows = max(orders[0].rows for orders in found)
        return [[order.padded(rows) for order in orders] for orders in found]

    def _pack_codes(self, stored: ExpertTensors, expert: int, runs: Sequence[_RowRun]) -> dict[str, torch.Tensor]:
        """One expert's tiles of one stack."""
        tiles = []
        for run in runs:
            bits = self.spec.of(run.names[0])[expert].bits
            qweight = _side_by_side([stored[name].qweight for name in run.names])
            tiles.append(to_tiles(qweight, bits, run.orders[expert], run.source[expert]))
        return tiles[0] if len(tiles) == 1 else {name: torch.cat([tile[name] for tile in tiles]) for name in tiles[0]}

    def _pack_small(self, experts: Sequence[ExpertTensors], runs: Sequence[_RowRun]) -> dict[str, torch.Tensor]:
        """Scales, zero points and biases of one stack, of all experts at once."""
        names = tuple(name for run in runs for name in run.names)
        specs = {name: self.spec.of(name) for name in names}
        scales = [_rearranged([stored[name].scales for stored in experts for name in run.names], run) for run in runs]
        packed = {"scales": _side_by_side(scales)}
        if not all(spec.sym for of in specs.values() for spec in of):
            zeros = [
                [stored_zeros(stored[name], specs[name][e]) for e, stored in enumerate(experts) for name in run.names]
                for run in runs
            ]
            rearranged = [_rearranged(each, run) for each, run in zip(zeros, runs, strict=True)]
            packed["zeros"] = _side_by_side(rearranged).view(torch.int32)
        if any(spec.has_bias for of in specs.values() for spec in of):
            biases = [self._bias(stored, expert, names) for expert, stored in enumerate(experts)]
            packed["bias"] = _side_by_side(biases).view(len(experts), -1)
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


def _rearranged(stored: Sequence[torch.Tensor], run: _RowRun) -> torch.Tensor:
    """Tensors [groups, columns] of a run's projections, expert by expert, as the stack has them: [E, groups, rows]."""
    together, experts = _side_by_side(stored), len(run.orders)
    columns, device = together.shape[1], together.device
    first = torch.arange(0, columns, columns // experts, device=device)[:, None]
    groups = torch.arange(len(together), device=device)[None]
    if run.in_units:
        groups = torch.stack([order.unit_group for order in run.orders])
    chosen = together[groups[:, :, None], (run.source.clamp(min=0) + first)[:, None]]
    return torch.where((run.source >= 0)[:, None], chosen, 0)


def _stacked_orders(orders: Sequence[Sequence[RowOrder]]) -> torch.Tensor | None:
    """All experts' orders of each part, int32 [E, parts, rows]; None if nothing moves anywhere."""
    if all(each.order is None for part in orders for each in part):
        return None
    places = [[_in_order(part) if each.order is None else each.order for each in part] for part in orders]
    return torch.stack([torch.stack(part) for part in places], 1)


def _in_order(orders: Sequence[RowOrder]) -> torch.Tensor:
    """The order of rows that have not moved, int32 [rows]; as many as these have."""
    return torch.arange(orders[0].rows, dtype=torch.int32, device=orders[0].unit_group.device)


def _side_by_side(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Concatenated along the last dimension, in a dtype that holds them all."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), -1)


def _below(packed: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose names begin so, by the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in packed.items() if name.startswith(prefix)}
