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
from graftq.quant_linear.layouts import GptqTensors
from graftq.quant_linear.packing import zero_points
from graftq.quant_linear.spec import QuantSpec
from graftq.quant_linear.tiled_layout import CHUNK_TILES, NO_ROW, PADDED_N, TILE_N, Plan, TiledLayout
from graftq.quant_linear.workspace import reserve

PREFIX = "tiled_"
"""What the names of all packed tensors begin with; an experts module has names of its own."""

HALF_FRAGMENT = 8
"""Rows of gate, then of up, that alternate in the fused form."""

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64)

Stored = Mapping[str, GptqTensors]
"""One expert's tensors by projection."""


@dataclass(frozen=True)
class _Part:
    """A run of a stack's rows, a multiple of 128, whose input rows go the same way.

    Attributes:
        names: The projections that the rows come from.
        source: int64 [rows], for each row the column of these projections' stored tensors side by side, or -1.
        plan: Where the input rows go.
    """

    names: tuple[str, ...]
    source: torch.Tensor
    plan: Plan


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
        experts: list[Stored] = [
            {name: take(name, expert) for name in self.spec.names} for expert in range(self.spec.num_experts)
        ]
        reserve(experts[0][self.spec.names[0]].qweight.device)
        kept = self._keep(experts)
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
        return packed | kept

    def unpack(self, packed: Mapping[str, torch.Tensor], name: str, expert: int) -> GptqTensors:
        """Restore one projection bit for bit."""
        spec = self.spec.of(name)[expert]
        stack = "down" if name == "down_proj" else "up"
        own = {key.removeprefix(f"{PREFIX}{stack}_"): tensor for key, tensor in packed.items()}
        device = own["codes"].device
        g_idx = self._kept(packed, "g_idx", name, expert)
        scale_dtype, bias_dtype, g_idx_dtype = (
            _DTYPES[code] for code in packed[f"{PREFIX}dtypes"][expert, self.spec.names.index(name)].tolist()
        )
        layout = TiledLayout(spec)
        in_units = own["scales"].shape[1] != spec.num_groups
        plan = layout.plan(g_idx, device, in_units).padded(own["codes"].shape[2] * 128)
        rows = self._rows_of(name, expert, own.get("columns"), device)
        tiles = {key: own[key][expert] for key in ("codes", "high") if key in own}
        first, last = (int(rows.min()) // TILE_N, int(rows.max()) // TILE_N + 1)
        qweight = layout.from_tiles({key: words[first:last] for key, words in tiles.items()}, plan)
        scales = own["scales"][expert][:, rows]
        if plan.unit_group is not None:
            scales = scales[torch.searchsorted(plan.unit_group, torch.arange(spec.num_groups, device=device))]
        qzeros = self._kept(packed, "qzeros", name, expert)
        assert qzeros is not None
        bias = None
        if spec.has_bias:
            bias = own["bias"][expert][self._columns(name, expert)[: spec.stored_bias].to(device)].to(bias_dtype)
        return GptqTensors(
            qweight[:, rows - first * TILE_N].contiguous(),
            qzeros.view(spec.num_groups, spec.packed_zero_columns),
            scales.to(scale_dtype).contiguous(),
            None if g_idx is None else g_idx.to(g_idx_dtype),
            bias,
        )

    @property
    def up_names(self) -> tuple[str, ...]:
        """The projections that make the first stack."""
        return self.spec.names[:-1]

    @property
    def intermediate(self) -> int:
        """Inputs of ``down_proj``."""
        return self.spec.of("down_proj")[0].in_features

    @property
    def part_rows(self) -> int:
        """Rows from one projection to the next in the first stack's split form."""
        return -(-max(self.spec.of(name)[0].padded_out for name in self.up_names) // PADDED_N) * PADDED_N

    def _parts(
        self, experts: Sequence[Stored]
    ) -> tuple[list[list[_Part]], list[list[_Part]], dict[str, torch.Tensor], torch.Tensor | None]:
        """Both stacks' parts per expert, their orders, and the fused form's columns (or None: split)."""
        device = experts[0]["down_proj"].qweight.device
        down = self._plans(("down_proj",), experts)
        up = self._plans(self.up_names, experts)
        shared = all(_same(plan, plans[0]) for plans in up for plan in plans)
        fused = self.spec.activation is not None and shared
        orders = {"up": _orders([plans[:1] if fused else plans for plans in up])}
        if not fused:
            orders["down"] = _orders(down)
        columns: list[torch.Tensor] = []
        up_parts: list[list[_Part]] = []
        for expert, plans in enumerate(up):
            if fused:
                columns.append(self._fused_columns(expert, down[expert][0], device))
                source = self._source(columns[-1], expert)
                up_parts.append([_Part(self.up_names, source, plans[0])])
            else:
                up_parts.append(
                    [
                        _Part((name,), _run(self.spec.of(name)[expert].padded_out, self.part_rows, device), plan)
                        for name, plan in zip(self.up_names, plans, strict=True)
                    ]
                )
        padded_out = self.spec.of("down_proj")[0].padded_out
        rows = -(-padded_out // PADDED_N) * PADDED_N
        down_parts = [[_Part(("down_proj",), _run(padded_out, rows, device), plans[0])] for plans in down]
        present = {stack: order for stack, order in orders.items() if order is not None}
        return up_parts, down_parts, present, torch.stack(columns) if fused else None

    def _plans(self, names: tuple[str, ...], experts: Sequence[Stored]) -> list[list[Plan]]:
        """Plans of some projections of all experts, alike in units and rows."""

        def plans(in_units: bool) -> list[list[Plan]]:
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

    def _columns(self, name: str, expert: int) -> torch.Tensor:
        """Of a first-stack projection's stored columns, or ``down_proj``'s: their numbers; int64 [padded_out]."""
        padded_out = self.spec.of(name)[expert].padded_out
        if name == "down_proj" or len(self.up_names) == 1:
            return torch.arange(padded_out)
        inner, is_up = self.intermediate, name == "up_proj"
        inputs = torch.arange(inner)
        inputs = inputs + is_up * inner if self.spec.is_concatenated else 2 * inputs + is_up
        return torch.cat(
            [inputs, torch.arange(2 * inner, 2 * inner + padded_out - inner) + is_up * (padded_out - inner)]
        )

    def _fused_columns(self, expert: int, down: Plan, device: torch.device) -> torch.Tensor:
        """The column of each row of the fused form: int32 [rows], :data:`NO_ROW` for padding."""
        inner = self.intermediate
        place = torch.arange(down.rows, device=device)
        value = place if down.order is None else down.order.long()
        gates = 1 + self.spec.is_gated
        total = sum(self.spec.of(name)[expert].padded_out for name in self.up_names)
        extra = torch.arange(gates * inner, total, device=device)
        used = gates * down.rows
        rows = -(-(used + len(extra)) // PADDED_N) * PADDED_N
        columns = torch.full((rows,), NO_ROW, dtype=torch.int64, device=device)
        columns[used : used + len(extra)] = extra
        if not self.spec.is_gated:
            columns[:used] = torch.where(value < inner, value, NO_ROW)
            return columns.to(torch.int32)
        gate_row = place // HALF_FRAGMENT * (2 * HALF_FRAGMENT) + place % HALF_FRAGMENT
        gate, up = (value, value + inner) if self.spec.is_concatenated else (2 * value, 2 * value + 1)
        columns[gate_row] = torch.where(value < inner, gate, NO_ROW)
        columns[gate_row + HALF_FRAGMENT] = torch.where(value < inner, up, NO_ROW)
        return columns.to(torch.int32)

    def _source(self, columns: torch.Tensor, expert: int) -> torch.Tensor:
        """``columns`` as places among the first stack's stored columns, side by side; -1 for padding."""
        numbers = torch.cat([self._columns(name, expert) for name in self.up_names]).to(columns.device)
        place = torch.argsort(numbers)
        return torch.where(columns != NO_ROW, place[columns.clamp(max=len(place) - 1).long()], -1)

    def _rows_of(self, name: str, expert: int, columns: torch.Tensor | None, device: torch.device) -> torch.Tensor:
        """The rows that hold the stored columns of a projection: int64 [padded_out]."""
        padded_out = self.spec.of(name)[expert].padded_out
        if name == "down_proj" or columns is None:
            first = 0 if name == "down_proj" else self.part_rows * self.up_names.index(name)
            return torch.arange(first, first + padded_out, device=device)
        own = columns[expert].long()
        row = own.new_empty(int((own != NO_ROW).sum()))
        real = torch.nonzero(own != NO_ROW).flatten()
        row[own[real]] = real
        return row[self._columns(name, expert).to(device)]

    def _pack_stack(self, stored: Stored, expert: int, parts: list[_Part]) -> dict[str, torch.Tensor]:
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

    def _bias(self, stored: Stored, expert: int, names: tuple[str, ...]) -> torch.Tensor:
        """The checkpoint's biases of one expert's stack, by column; 0 where it stores none."""
        biases = {name: stored[name].bias for name in names}
        present = [bias for bias in biases.values() if bias is not None]
        total = sum(self.spec.of(name)[expert].padded_out for name in names)
        dtype = _side_by_side([bias[None] for bias in present]).dtype if present else torch.float16
        whole = torch.zeros(total, dtype=dtype, device=stored[names[0]].scales.device)
        for name, bias in biases.items():
            if bias is not None:
                whole[self._columns(name, expert)[: len(bias)].to(whole.device)] = bias.to(dtype)
        return whole

    def _keep(self, experts: Sequence[Stored]) -> dict[str, torch.Tensor]:
        """What only :meth:`unpack` needs."""
        every = [stored[name] for stored in experts for name in self.spec.names]
        device = every[0].qweight.device
        codes = [
            [_DTYPES.index(torch.float32 if tensor is None else tensor.dtype) for tensor in (t.scales, t.bias, t.g_idx)]
            for t in every
        ]
        dtypes = torch.tensor(codes, dtype=torch.int8, device=device).view(len(experts), len(self.spec.names), 3)
        kept = {f"{PREFIX}qzeros": torch.cat([t.qzeros.flatten() for t in every]), f"{PREFIX}dtypes": dtypes}
        g_idx = [t.g_idx for t in every if t.g_idx is not None]
        return kept | ({f"{PREFIX}g_idx": torch.cat(g_idx)} if g_idx else {})

    def _kept(self, packed: Mapping[str, torch.Tensor], what: str, name: str, expert: int) -> torch.Tensor | None:
        """One projection's run of ``qzeros`` or ``g_idx``, flat; None if it stores none."""
        start = size = 0
        for other in range(expert + 1):
            for projection, specs in self.spec.projections:
                spec = specs[other]
                size = spec.stored_g_idx if what == "g_idx" else spec.num_groups * spec.packed_zero_columns
                if (other, projection) == (expert, name):
                    return packed[f"{PREFIX}{what}"][start : start + size].clone() if size else None
                start += size
        raise LookupError(f"{expert}.{name}")


def _zeros(tensors: GptqTensors, spec: QuantSpec) -> torch.Tensor:
    """Zero points of all stored columns, int16 [groups, padded_out]; 0 for those that the writer padded."""
    zeros = zero_points(tensors, spec).to(torch.int16)
    return torch.nn.functional.pad(zeros, (0, spec.padded_out - spec.out_features))


def _run(count: int, rows: int, device: torch.device) -> torch.Tensor:
    """Stored columns one after the other, then padding: a part's ``source``."""
    index = torch.arange(rows, device=device)
    return torch.where(index < count, index, -1)


def _same(a: Plan, b: Plan) -> bool:
    return all(
        (one is None) == (other is None) and (one is None or other is None or torch.equal(one, other))
        for one, other in ((a.order, b.order), (a.unit_group, b.unit_group))
    )


def _orders(plans: Sequence[Sequence[Plan]]) -> torch.Tensor | None:
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
