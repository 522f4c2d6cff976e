"""The experts of a layer on a CPU: all of an expert's tensors in stacks, read only for the experts that are chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from graftq.quant_linear.cpu_layout import CpuLayout
from graftq.quant_linear.cpu_ops import CpuExpertsLinear
from graftq.quant_linear.cpu_provider import judge_cpu, layout_of, weights_of
from graftq.quant_linear.experts import QuantExperts
from graftq.quant_linear.experts_spec import ExpertsSpec
from graftq.quant_linear.layouts import GptqTensors
from graftq.quant_linear.selection import Accepted, ExpertsRequest, Rejected, Verdict
from graftq.quant_linear.spec import QuantSpec

PREFIX = "packed_"
"""What the names of all packed tensors begin with; an experts module has names of its own."""

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64)
_KEPT = ("scales", "bias", "g_idx")  # tensors that keep the dtype they are stored in


@dataclass(frozen=True)
class StackedLayout:
    """The tensors of :class:`CpuLayout`, stacked: ``packed_{projection}_{tensor}`` [E, ...].

    ``packed_dtypes``, int8 [E, projections, 3], remembers the stored dtypes of scales, bias and g_idx (-1: absent), and
    ``packed_{projection}_order`` is there if any expert's rows have moved. Experts whose groups lie differently are
    padded to the longest.
    """

    spec: ExpertsSpec

    def pack(self, take: Callable[[str, int], GptqTensors]) -> dict[str, torch.Tensor]:
        """Repack, projection by projection, dropping each expert's tensors once they are done."""
        packed: dict[str, torch.Tensor] = {}
        dtypes = torch.full((self.spec.num_experts, len(self.spec.names), len(_KEPT)), -1, dtype=torch.int8)
        for place, name in enumerate(self.spec.names):
            stored = [take(name, expert) for expert in range(self.spec.num_experts)]
            for expert, tensors in enumerate(stored):
                for kind, suffix in enumerate(_KEPT):
                    tensor = getattr(tensors, suffix)
                    dtypes[expert, place, kind] = -1 if tensor is None else _DTYPES.index(tensor.dtype)
            for suffix, stack in _stack(self._layouts(name), stored).items():
                packed[f"{PREFIX}{name}_{suffix}"] = stack
        return packed | {f"{PREFIX}dtypes": dtypes}

    def unpack(self, packed: Mapping[str, torch.Tensor], name: str, expert: int) -> GptqTensors:
        """Restore one projection bit for bit."""
        own = {suffix: stack[expert] for suffix, stack in self.of(packed, name).items()}
        dtypes = packed[f"{PREFIX}dtypes"][expert, self.spec.names.index(name)].tolist()
        for suffix, dtype in zip(_KEPT, dtypes, strict=True):
            kept = own.pop(suffix, None)
            if kept is not None and dtype >= 0:
                own[suffix] = kept.to(_DTYPES[dtype])
        return self._layouts(name)[expert].unpack(own)

    def of(self, packed: Mapping[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
        """The stacks of one projection."""
        start = f"{PREFIX}{name}_"
        return {key.removeprefix(start): tensor for key, tensor in packed.items() if key.startswith(start)}

    def _layouts(self, name: str) -> list[CpuLayout]:
        return [layout_of(spec) for spec in self.spec.of(name)]


def _stack(layouts: Sequence[CpuLayout], stored: list[GptqTensors]) -> dict[str, torch.Tensor]:
    """Pack each expert's tensors into stacks; empties ``stored``."""
    device = stored[0].qweight.device
    unit = min(layout.unit(tensors.g_idx) for layout, tensors in zip(layouts, stored, strict=True))
    places = [layout.places(tensors.g_idx, unit, device) for layout, tensors in zip(layouts, stored, strict=True)]
    rows = max(place.rows for place in places)
    moved = any(place.order is not None for place in places)
    dtypes = {suffix: _common(stored, suffix) for suffix in _KEPT}
    stacks: dict[str, torch.Tensor] = {}
    for expert, layout in enumerate(layouts):
        packed = layout.pack_in(stored.pop(0), unit)
        if moved:
            layout.pad(packed, rows, unit)
        for suffix, tensor in packed.items():
            if suffix not in stacks:
                dtype = dtypes.get(suffix) or tensor.dtype
                stacks[suffix] = tensor.new_empty(len(layouts), *tensor.shape, dtype=dtype)
            stacks[suffix][expert] = tensor
    return stacks


def _common(stored: Sequence[GptqTensors], suffix: str) -> torch.dtype | None:
    """A dtype that holds every expert's, should they differ."""
    dtypes = [tensor.dtype for tensors in stored if (tensor := getattr(tensors, suffix)) is not None]
    found = dtypes[0] if dtypes else None
    for dtype in dtypes:
        found = torch.promote_types(found, dtype) if found is not None else dtype
    return found


class CpuExperts:
    """Projection by projection, each expert's tokens together; activation, biases and norm as the model has them."""

    name = "cpu"
    priority = 50

    def judge(self, request: ExpertsRequest) -> Verdict:
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
        self, module: QuantExperts, x: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Shapes as in :meth:`QuantExperts.forward`; differentiable in ``x`` and the weights."""
        layout, packed = StackedLayout(module.spec), module.packed()
        up = [_linear(x, top_k_index, layout.of(packed, name), module.spec.of(name)) for name in module.spec.names[:-1]]
        hidden = up[0]
        if len(up) == 2:
            is_concatenated = module.spec.is_concatenated
            hidden = torch.cat(up, dim=-1) if is_concatenated else torch.stack(up, dim=-1).flatten(-2)
        known = top_k_index.clamp(max=module.num_experts - 1)
        if module.up_bias is not None:
            hidden = hidden + module.up_bias[known].to(x.dtype)
        inner = module.activate(hidden.flatten(0, 1))
        down = layout.of(packed, "down_proj")
        output = _linear(inner, top_k_index.reshape(-1, 1), down, module.spec.of("down_proj"))
        output = output.view(*top_k_index.shape, x.shape[1])
        if module.down_bias is not None:
            output = output + module.down_bias[known].to(x.dtype)
        if module.post_expert_norm is not None:
            output = module.post_expert_norm(output)
        weights = top_k_weights.masked_fill(top_k_index >= module.num_experts, 0)
        return (output.float() * weights[..., None].float()).sum(1).to(x.dtype)


_FREE = ("desc_act", "sym", "signature")
"""What experts may differ in."""


def _linear(
    x: torch.Tensor, index: torch.Tensor, packed: Mapping[str, torch.Tensor], specs: Sequence[QuantSpec]
) -> torch.Tensor:
    weights = weights_of(packed, specs[0])._replace(sym=all(spec.sym for spec in specs))
    arguments = (index, *weights, specs[0].out_features)
    if x.requires_grad and torch.is_grad_enabled():
        return CpuExpertsLinear.apply(x, *arguments)
    return torch.ops.graftq.cpu_experts_linear(x, *arguments)
