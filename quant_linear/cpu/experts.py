"""The experts of a layer on a CPU: all of an expert's tensors in stacks, read only for the experts that are chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce

import torch

from graftq.quant_linear.cpu.availability import judge_cpu, layout_of, weights_of
from graftq.quant_linear.cpu.dequantized_matmul import CpuWeights
from graftq.quant_linear.cpu.layout import CpuLayout
from graftq.quant_linear.cpu.ops import cpu_experts_linear
from graftq.quant_linear.experts_spec import ExpertsSpec
from graftq.quant_linear.layouts import KEPT, STORED_DTYPES, GptqTensors, Packed, stored_dtypes
from graftq.quant_linear.row_order import can_multiply_as_one
from graftq.quant_linear.selection import Accepted, ExpertsModule, Rejected, Request, Verdict
from graftq.quant_linear.spec import QuantSpec

PREFIX = "packed_"
"""What the names of all packed tensors begin with; an experts module has names of its own."""

_GATE_UP, _JOINED = ("gate_proj", "up_proj"), "gate_up_proj"
_WHOLE = 64  # gate and up are joined where their outputs are a multiple: no padding between them, in any layout
_FREE = ("desc_act", "sym", "signature")  # what experts may differ in


@dataclass(frozen=True)
class StackedForm:
    """How experts are stacked.

    Attributes:
        is_joined: Whether gate and up, apart in the checkpoint, are one projection, ``gate_up_proj``.
        units: Of each stack, its name and the number of rows in a unit.
    """

    is_joined: bool
    units: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class StackedLayout:
    """The tensors of :class:`CpuLayout`, stacked: ``packed_{projection}_{tensor}`` [E, ...].

    ``gate_proj`` and ``up_proj`` become one projection of twice the outputs, ``gate_up_proj``, where each expert's two
    have the same ``g_idx``, as those that were quantized together have. ``packed_dtypes``, int8 [E, projections, 3],
    remembers the stored dtypes of scales, bias and g_idx (-1: absent), and ``packed_{projection}_order`` is there if
    any expert's rows have moved. Experts whose groups lie differently are padded to the longest.
    """

    spec: ExpertsSpec
    _stacks: dict[str, tuple[QuantSpec, list[str]]] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        # At once: what is computed while torch.compile follows a call may be nothing that it cannot follow, a lock say.
        object.__setattr__(self, "_stacks", _stacks_of(self.spec))

    def pack(self, take: Callable[[str, int], GptqTensors]) -> Packed:
        """Repack, projection by projection, dropping each expert's tensors once they are done."""
        packed: dict[str, torch.Tensor] = {}
        units: dict[str, int] = {}
        dtypes: list[torch.Tensor] = []
        stored: dict[str, list[GptqTensors]] = {}
        for name in self.spec.names:
            stored[name] = [take(name, expert) for expert in range(self.spec.num_experts)]
            dtypes.append(stored_dtypes(stored[name]))
            if name == "gate_proj":
                continue  # until up_proj is there, too
            products = [tuple(stored)] if self._can_join(stored) else [(each,) for each in stored]
            for parts in products:
                stack = parts[0] if len(parts) == 1 else _JOINED
                layouts = [layout_of(spec) for spec in self.spec.of(parts[0])]
                tensors, units[stack] = _stack(layouts, [stored.pop(part) for part in parts])
                packed |= {f"{PREFIX}{stack}_{suffix}": tensor for suffix, tensor in tensors.items()}
        form = StackedForm(_JOINED in units and _JOINED not in self.spec.names, tuple(units.items()))
        return Packed(packed | {f"{PREFIX}dtypes": torch.stack(dtypes, 1)}, form)

    def unpack(self, packed: Packed, name: str, expert: int) -> GptqTensors:
        """Restore one projection bit for bit."""
        form = packed.form
        assert isinstance(form, StackedForm)
        layout = layout_of(self.spec.of(name)[expert])
        is_half = name in _GATE_UP and form.is_joined
        stack = _JOINED if is_half else name
        start = f"{PREFIX}{stack}_"
        own = {key.removeprefix(start): tensor[expert] for key, tensor in packed.items() if key.startswith(start)}
        if is_half:
            for suffix, dim in layout.OUTPUTS.items():
                if suffix in own:
                    own[suffix] = own[suffix].chunk(2, dim)[_GATE_UP.index(name)].contiguous()
        dtypes = packed[f"{PREFIX}dtypes"][expert, self.spec.names.index(name)].tolist()
        for suffix, dtype in zip(KEPT, dtypes, strict=True):
            kept = own.pop(suffix, None)
            if kept is not None and dtype >= 0:
                own[suffix] = kept.to(STORED_DTYPES[dtype])
        return layout.unpack(Packed(own, dict(form.units)[stack]))

    def weights(self, packed: Mapping[str, torch.Tensor | None], stack: str) -> tuple[CpuWeights, int]:
        """The operator's arguments for one projection of all experts: its weights and its number of outputs."""
        spec, names = self._stacks[stack]
        return weights_of(packed, spec, names), spec.out_features

    def _can_join(self, stored: Mapping[str, Sequence[GptqTensors]]) -> bool:
        """Whether these are gate and up, which one product can serve for each expert, and no padding is between."""
        if tuple(stored) != _GATE_UP:
            return False
        gates, ups = (list(zip(self.spec.of(name), stored[name], strict=True)) for name in _GATE_UP)
        return all(
            can_multiply_as_one(gate, gate_tensors.g_idx, up, up_tensors.g_idx)
            and (gate.out_features, gate.padded_out, gate.stored_g_idx, gate.stored_bias)
            == (up.out_features, up.padded_out, up.stored_g_idx, up.stored_bias)
            and (gate_tensors.g_idx is None or up_tensors.g_idx is None or gate_tensors.g_idx.equal(up_tensors.g_idx))
            and up.padded_out == up.out_features
            and up.out_features % _WHOLE == 0
            for (gate, gate_tensors), (up, up_tensors) in zip(gates, ups, strict=True)
        )


def _stacks_of(experts: ExpertsSpec) -> dict[str, tuple[QuantSpec, list[str]]]:
    """What the experts of each stack have in common, and their tensors' names in the operator's order."""
    specs = dict(experts.projections)
    common = {name: replace(of[0], sym=all(spec.sym for spec in of)) for name, of in specs.items()}
    if experts.names[:-1] == _GATE_UP:
        gate, up = (common[name] for name in _GATE_UP)
        outputs = gate.out_features + up.out_features
        common[_JOINED] = replace(gate, sym=gate.sym and up.sym, out_features=outputs, padded_out=outputs)
    tensors = CpuWeights._fields[:7]
    return {name: (spec, [f"{PREFIX}{name}_{tensor}" for tensor in tensors]) for name, spec in common.items()}


def _stack(layouts: Sequence[CpuLayout], parts: Sequence[list[GptqTensors]]) -> tuple[dict[str, torch.Tensor], int]:
    """Pack each expert's tensors into stacks, its outputs of all ``parts`` side by side; empties ``parts``.

    Returns:
        The stacks by suffix, and the number of rows in a unit.
    """
    first = parts[0]
    device = first[0].qweight.device
    unit = min(layout.unit(tensors.g_idx) for layout, tensors in zip(layouts, first, strict=True))
    orders = [layout.row_order(tensors.g_idx, unit, device) for layout, tensors in zip(layouts, first, strict=True)]
    rows = max(order.rows for order in orders)
    moved = any(order.order is not None for order in orders)
    dtypes = {suffix: _common([tensors for part in parts for tensors in part], suffix) for suffix in KEPT}
    stacks: dict[str, torch.Tensor] = {}
    for expert, layout in enumerate(layouts):
        for number, part in enumerate(parts):
            packed = layout.pack_in(part.pop(0), unit)
            if moved:
                layout.pad(packed, rows, unit)
            for suffix, tensor in packed.items():
                dim = layout.OUTPUTS.get(suffix)
                if suffix not in stacks:
                    shape = [size * (len(parts) if each == dim else 1) for each, size in enumerate(tensor.shape)]
                    dtype = dtypes.get(suffix) or tensor.dtype
                    stacks[suffix] = tensor.new_empty(len(layouts), *shape, dtype=dtype)
                own = stacks[suffix][expert]
                own = own if dim is None else own.chunk(len(parts), dim)[number]
                own.copy_(tensor)
    return stacks, unit


def _common(stored: Sequence[GptqTensors], suffix: str) -> torch.dtype | None:
    """A dtype that holds every expert's, should they differ."""
    dtypes = [tensor.dtype for tensors in stored if (tensor := getattr(tensors, suffix)) is not None]
    return reduce(torch.promote_types, dtypes) if dtypes else None


class CpuExperts:
    """Projection by projection, each expert's tokens together; activation, biases and norm as the model has them."""

    def judge(self, request: Request[ExpertsSpec]) -> Verdict:
        """Accept experts on a CPU that are packed alike."""
        verdict = judge_cpu(request)
        if isinstance(verdict, Rejected):
            return verdict
        for name, specs in request.spec.projections:
            values = {key: {getattr(spec, key) for spec in specs} for key in vars(specs[0]) if key not in _FREE}
            values["stored_g_idx"] = {spec.stored_g_idx for spec in specs if spec.has_g_idx}
            if differing := [key for key, found in values.items() if len(found) > 1]:
                return Rejected(f"the experts' {name} differ in {' and '.join(differing)}")
        return Accepted()

    def layout(self, spec: ExpertsSpec) -> StackedLayout:
        """Stacks of nibbles or bytes."""
        return StackedLayout(spec)

    @torch.amp.autocast("cpu", enabled=False)  # which would refuse to join float16 tensors
    def experts(
        self, module: ExpertsModule, x: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Shapes as in :meth:`QuantExperts.forward`; differentiable in ``x`` and the weights."""
        layout, packed, form = module.layout, module.tensors, module.form
        assert isinstance(layout, StackedLayout)
        assert isinstance(form, StackedForm)
        index = top_k_index.flatten()
        expert, slot = index.masked_fill(index < 0, module.num_experts).sort(stable=True)
        token = slot.div(top_k_index.shape[1], rounding_mode="floor")
        known = expert.clamp(max=module.num_experts - 1)

        def multiply(rows: torch.Tensor, token: torch.Tensor | None, stack: str) -> torch.Tensor:
            weights, outputs = layout.weights(packed, stack)
            return cpu_experts_linear(rows, token, expert, weights, outputs)

        names = (_JOINED,) if form.is_joined else module.spec.names[:-1]
        ups = [multiply(x, token, name) for name in names]
        hidden = ups[0] if len(ups) == 1 else torch.cat(ups, dim=-1)
        if module.spec.names[:-1] == _GATE_UP and not module.spec.is_concatenated:
            hidden = hidden.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
        if module.up_bias is not None:
            hidden = hidden + module.up_bias[known].to(x.dtype)
        output = multiply(module.activate(hidden), None, "down_proj")
        if module.down_bias is not None:
            output = output + module.down_bias[known].to(x.dtype)
        if module.post_expert_norm is not None:
            output = module.post_expert_norm(output)
        weights = top_k_weights.flatten().index_select(0, slot).float().masked_fill(expert >= module.num_experts, 0)
        total = torch.zeros_like(x, dtype=torch.float32)
        return total.index_add_(0, token, output.float() * weights[:, None]).to(x.dtype)
