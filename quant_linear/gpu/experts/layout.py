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
from graftq.quant_linear.gpu.tiled_layout import CHUNK_TILES, TILE_N, RowOrder, TiledLayout
from graftq.quant_linear.layouts import GptqTensors
from graftq.quant_linear.packing import zero_points
from graftq.quant_linear.spec import QuantSpec

PREFIX = "tiled_"
"""What the names of all packed tensors begin with; an experts module has names of its own."""

ExpertTensors = Mapping[str, GptqTensors]
"""One expert's tensors by projection."""


@dataclass(frozen=True)
class _RowRun:
    """A run of a stack's rows, a multiple of 128, whose input rows go the same way.

    Attributes:
        names: The projections that the rows come from.
        source: int64 [rows], for each row the column of these projections' stored tensors side by side, or -1.
        plan: Where the input rows go.
    """

    names: tuple[str, ...]
    source: torch.Tensor
    plan: RowOrder


@dataclass(frozen=True)
class TiledExpertsLayout:
    """Stacks ``up`` (gate and up) and ``down`` of :class:`TiledLayout`, E experts each.

    =================== ===================================== =========================================================
    tensor, "tiled\\_"+  shape                                 meaning
    =================== ===================================== =========================================================
    up_codes, up_high   int16 [E, tiles, atoms, ...]          as in :class:`TiledLayout`
    up_scales           [E, groups, 64 * tiles]               0 for rows of padding
    up_zeros            int16, like ``up_scales``             zero points, offset included; if any is not symmetric
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

    def pack(self, take: Callable[[str, int], GptqTensors]) -> dict[str, torch.Tensor]:
        """Repack, on the device the tensors are on, dropping each expert once it is done."""
        experts: list[ExpertTensors] = [
            {name: take(name, expert) for name in self.spec.names} for expert in range(self.spec.num_experts)
        ]
        reserve(experts[0][self.spec.names[0]].qweight.device)
        kept = pack_metadata(self.spec, experts)
        up, down, orders, columns = self._parts(experts)
        packed: dict[str, torch.Tensor] = {}
        for expert, parts in enumerate(zip(up, down, strict=True)):
            stored = experts[expert]
            experts[expert] = {}
            for stack, stack_parts in zip(("up", "down"), parts, strict=True):
                for name, tensor in self._pack_stack(stored, expert, stack_parts).items():
                    key = f"{PREFIX}{stack}_{name}"
                    if key not in packed:
                        packed[key] = tensor.new_empty(self.spec.num_experts, *tensor.shape)
                    # A dtype that holds every expert's, should they differ.
                    packed[key] = packed[key].to(torch.promote_types(packed[key].dtype, tensor.dtype))
                    packed[key][expert] = tensor
        for stack, order in orders.items():
            packed[f"{PREFIX}{stack}_order"] = order
        if columns is not None:
            packed[f"{PREFIX}up_columns"] = columns
        return packed | {f"{PREFIX}{name}": tensor for name, tensor in kept.items()}

    def unpack(self, packed: Mapping[str, torch.Tensor], name: str, expert: int) -> GptqTensors:
        """Restore one projection bit for bit."""
        spec = self.spec.of(name)[expert]
        stack = "down" if name == "down_proj" else "up"
        kept = metadata_of(self.spec, _below(packed, PREFIX), name, expert)
        own = {key: tensor[expert] for key, tensor in _below(packed, f"{PREFIX}{stack}_").items()}
        device = own["codes"].device
        layout = TiledLayout(spec)
        in_units = len(own["scales"]) != spec.num_groups
        plan = layout.plan(kept.g_idx, device, in_units).padded(own["codes"].shape[1] * 128)
        rows = self.rows.holding(name, expert, own.get("columns"), device)
        first, last = (int(rows.min()) // TILE_N, int(rows.max()) // TILE_N + 1)
        qweight = layout.from_tiles({key: own[key][first:last] for key in ("codes", "high") if key in own}, plan)
        scales = own["scales"][:, rows]
        if plan.unit_group is not None:
            scales = scales[torch.searchsorted(plan.unit_group, torch.arange(spec.num_groups, device=device))]
        bias = None
        if spec.has_bias:
            bias = own["bias"][self.rows.columns(name, expert)[: spec.stored_bias].to(device)].to(kept.bias_dtype)
        return GptqTensors(
            qweight[:, rows - first * TILE_N].contiguous(),
            kept.qzeros,
            scales.to(kept.scale_dtype).contiguous(),
            kept.g_idx,
            bias,
        )

    @property
    def rows(self) -> StackRows:
        """Which row holds what."""
        return StackRows(self.spec)

    def _parts(
        self, experts: Sequence[ExpertTensors]
    ) -> tuple[list[list[_RowRun]], list[list[_RowRun]], dict[str, torch.Tensor], torch.Tensor | None]:
        """Both stacks' parts per expert, their orders, and the fused form's columns (or None: split)."""
        device = experts[0]["down_proj"].qweight.device
        down = self._plans(("down_proj",), experts)
        up = self._plans(self.rows.up_names, experts)
        shared = all(_same(plan, plans[0]) for plans in up for plan in plans)
        fused = self.spec.activation is not None and shared
        orders = {"up": _orders([plans[:1] if fused else plans for plans in up])}
        if not fused:
            orders["down"] = _orders(down)
        columns: list[torch.Tensor] = []
        up_parts: list[list[_RowRun]] = []
        for expert, plans in enumerate(up):
            if fused:
                columns.append(self.rows.fused_columns(expert, down[expert][0], device))
                source = self.rows.fused_source(columns[-1], expert)
                up_parts.append([_RowRun(self.rows.up_names, source, plans[0])])
            else:
                named = zip(self.rows.up_names, plans, strict=True)
                up_parts.append([self._part(name, expert, plan, device) for name, plan in named])
        down_parts = [[self._part("down_proj", expert, plans[0], device)] for expert, plans in enumerate(down)]
        present = {stack: order for stack, order in orders.items() if order is not None}
        return up_parts, down_parts, present, torch.stack(columns) if fused else None

    def _part(self, name: str, expert: int, plan: RowOrder, device: torch.device) -> _RowRun:
        """A projection by itself."""
        return _RowRun((name,), self.rows.split_source(name, expert, device), plan)

    def _plans(self, names: tuple[str, ...], experts: Sequence[ExpertTensors]) -> list[list[RowOrder]]:
        """Plans of some projections of all experts, alike in units and rows."""

        def plans(in_units: bool) -> list[list[RowOrder]]:
            return [
                [
                    TiledLayout(self.spec.of(name)[expert]).plan(
                        stored[name].g_idx, stored[name].qweight.device, in_units
                    )
                    for name in names
                ]
                for expert, stored in enumerate(experts)
            ]

        found = plans(in_units=False)
        if any(plan.unit_group is not None for each in found for plan in each):
            found = plans(in_units=True)
        rows = max(plan.rows for each in found for plan in each)
        return [[plan.padded(rows) for plan in each] for each in found]

    def _pack_stack(self, stored: ExpertTensors, expert: int, parts: list[_RowRun]) -> dict[str, torch.Tensor]:
        """One expert's tensors of one stack, all but the order."""
        tiles: list[dict[str, torch.Tensor]] = []
        scales, zeros = [], []
        stack_names = tuple(name for part in parts for name in part.names)
        for part in parts:
            specs = {name: self.spec.of(name)[expert] for name in part.names}
            layout = TiledLayout(specs[part.names[0]])
            real, source = part.source >= 0, part.source.clamp(min=0)
            qweight = _side_by_side([stored[name].qweight for name in part.names])
            for start in range(0, len(source), CHUNK_TILES * TILE_N):
                run = slice(start, start + CHUNK_TILES * TILE_N)
                tiles.append(layout.to_tiles(torch.where(real[run], qweight[:, source[run]], 0), part.plan))
            rows = slice(None) if part.plan.unit_group is None else part.plan.unit_group
            scale = _side_by_side([stored[name].scales for name in part.names])
            scales.append(torch.where(real, scale[:, source], 0)[rows])
            zero = _side_by_side([_zeros(stored[name], spec) for name, spec in specs.items()])
            zeros.append(torch.where(real, zero[:, source], 0)[rows])
        packed = {name: torch.cat([tile[name] for tile in tiles]) for name in tiles[0]}
        packed["scales"] = _side_by_side(scales)
        if not all(spec.sym for name in stack_names for spec in self.spec.of(name)):
            packed["zeros"] = _side_by_side(zeros)
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


def _zeros(tensors: GptqTensors, spec: QuantSpec) -> torch.Tensor:
    """Zero points of all stored columns, int16 [groups, padded_out]; 0 for those that the writer padded."""
    zeros = zero_points(tensors, spec).to(torch.int16)
    return torch.nn.functional.pad(zeros, (0, spec.padded_out - spec.out_features))


def _same(a: RowOrder, b: RowOrder) -> bool:
    return all(
        (one is None) == (other is None) and (one is None or other is None or torch.equal(one, other))
        for one, other in ((a.order, b.order), (a.unit_group, b.unit_group))
    )


def _orders(plans: Sequence[Sequence[RowOrder]]) -> torch.Tensor | None:
    """All experts' orders, int32 [E, parts, rows]; None if nothing moves anywhere."""
    if all(plan.order is None for each in plans for plan in each):
        return None
    moved = next(plan.order for each in plans for plan in each if plan.order is not None)
    unmoved = torch.arange(len(moved), dtype=torch.int32, device=moved.device)
    return torch.stack(
        [torch.stack([unmoved if plan.order is None else plan.order for plan in each]) for each in plans]
    )


def _side_by_side(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Concatenated along the last dimension, in a dtype that holds them all."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), -1)


def _below(packed: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose names begin so, by the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in packed.items() if name.startswith(prefix)}
