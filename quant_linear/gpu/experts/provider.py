"""The ``triton`` provider for experts: a layer's experts in at most four launches, whatever the number of experts."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

from graftq.quant_linear.experts_spec import ExpertsSpec
from graftq.quant_linear.gpu.availability import judge_triton
from graftq.quant_linear.gpu.dispatch_bypass import is_unwatched
from graftq.quant_linear.gpu.experts.layout import PREFIX, TiledExpertsLayout, TiledForm
from graftq.quant_linear.gpu.experts.row_map import HALF_FRAGMENT, StackRows
from graftq.quant_linear.selection import ExpertsModule, Rejected, Request, Verdict


class TritonExperts:
    """Repacks all experts into two stacks of tiles once (:class:`TiledExpertsLayout`), and multiplies from them."""

    def judge(self, request: Request[ExpertsSpec]) -> Verdict:
        """Accept what the linear layers' provider accepts, if the experts are of one kind."""
        verdict = judge_triton(request)
        if isinstance(verdict, Rejected):
            return verdict
        return _uniform(request.spec) or verdict

    def layout(self, spec: ExpertsSpec) -> TiledExpertsLayout:
        """Two stacks of tiles."""
        return TiledExpertsLayout(spec)

    def experts(
        self, module: ExpertsModule, x: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Shapes as in :meth:`QuantExperts.forward`.

        Differentiable in ``x`` and ``top_k_weights``, and in biases of the module's own; then, and where the activation
        has no name, gate and up differ in act-order, or there is a norm, the products are bare and torch does the rest.
        """
        spec, packed = module.spec, module.tensors
        up, down = _stack(packed, _UP, module.up_bias), _stack(packed, _DOWN, module.down_bias)
        assert isinstance(module.form, TiledForm)
        is_fused = module.form.is_fused
        learns = torch.is_grad_enabled() and any(
            tensor is not None and tensor.requires_grad
            for tensor in (x, top_k_weights, module.up_bias, module.down_bias)
        )
        if spec.activation is not None and is_fused and not spec.has_norm and not learns:
            run = _ops().tiled_experts if is_unwatched(x) else torch.ops.graftq.tiled_experts
            return run(x, top_k_index, top_k_weights, *up, *down, spec.signature)
        return _step_by_step(module, is_fused, x, top_k_index, top_k_weights, up, down)


@cache
def _ops() -> Any:
    from graftq.quant_linear.gpu.experts import ops  # not at the top, where triton may be absent

    return ops


_KIND = ("bits", "group_size", "num_groups", "in_features", "out_features", "padded_in", "padded_out")


def _uniform(spec: ExpertsSpec) -> Rejected | None:
    """Why these experts cannot share a kernel; None if they can."""
    kinds = {
        (name, tuple(getattr(each, field) for field in _KIND)) for name, specs in spec.projections for each in specs
    }
    for stack in (spec.names[:-1], spec.names[-1:]):
        found = {kind for name, kind in kinds if name in stack}
        if len(found) > 1:
            differing = [
                field for field, values in zip(_KIND, zip(*found, strict=True), strict=True) if len(set(values)) > 1
            ]
            return Rejected(
                f"the experts' {' and '.join(stack)} are not all alike in {', '.join(differing)}",
                "quantize all experts of a layer alike",
            )
    return None


Arguments = tuple[torch.Tensor | None, ...]
"""The tensors of a ``stacks.Stack``, in its order."""


# Written out once: a layer's call looks fourteen names up, in a model's every layer and step.
_UP, _DOWN = (
    tuple(f"{PREFIX}{stack}_{name}" for name in ("codes", "high", "scales", "zeros", "order", "bias", "columns"))
    for stack in ("up", "down")
)


def _stack(
    packed: Mapping[str, torch.Tensor | None], names: tuple[str, ...], own_bias: torch.Tensor | None
) -> Arguments:
    codes, high, scales, zeros, order, bias = [packed.get(name) for name in names[:-1]]
    if own_bias is not None:
        bias = own_bias if bias is None else bias[:, : own_bias.shape[1]] + own_bias
    columns = None if bias is None else packed.get(names[-1])  # which only a bias needs
    return codes, high, scales, zeros, order, columns, bias


def _step_by_step(
    module: ExpertsModule,
    is_fused: bool,
    x: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    up: Arguments,
    down: Arguments,
) -> torch.Tensor:
    """Bare products, and torch in between."""
    from graftq.quant_linear.gpu.experts.autograd import TiledProduct
    from graftq.quant_linear.gpu.experts.stacks import Stack  # not at the top, where triton may be absent

    spec, places = module.spec, StackRows(module.spec)
    first, second = Stack(*up), Stack(*down)  # type: ignore[arg-type]
    slots, experts = index.numel(), spec.num_experts
    expert = index.reshape(-1)
    is_ours = (expert >= 0) & (expert < experts)
    expert = torch.where(is_ours, expert, 0)

    if is_fused:
        rows = part_rows = second.codes.shape[2] * 128 * (1 + spec.is_gated)
    else:
        part_rows = places.part_rows
        rows = part_rows * len(places.up_names)
    signatures = [specs[0].signature for _, specs in spec.projections]
    hidden = TiledProduct.apply(x, index, *up, signatures[0], index.shape[1], part_rows, rows)
    if is_fused:
        if first.bias is not None:
            assert first.columns is not None
            bias = torch.nn.functional.pad(first.bias.to(x.dtype), (0, 1))  # rows of padding take the last column
            columns = first.columns[:, :rows].clamp(max=first.bias.shape[1]).long()
            hidden = hidden + bias[expert[:, None], columns[expert]]
        assert spec.activation is not None
        if spec.is_gated:
            halves = hidden.view(slots, -1, 2, HALF_FRAGMENT)
            hidden = spec.activation(halves[:, :, 0], halves[:, :, 1]).reshape(slots, -1)
        else:
            hidden = spec.activation(None, hidden)
    else:
        inner = places.intermediate
        if len(places.up_names) == 2:
            gate, value = hidden[:, :inner], hidden[:, part_rows : part_rows + inner]
            both = (gate, value)
            hidden = torch.cat(both, -1) if spec.is_concatenated else torch.stack(both, -1).flatten(-2)
        else:
            hidden = hidden[:, : inner * (1 + spec.is_gated)]
        if first.bias is not None:
            hidden = hidden + first.bias[expert, : hidden.shape[1]].to(x.dtype)
        hidden = module.activate(hidden)

    width = x.shape[1]
    out = TiledProduct.apply(hidden, index, *down, signatures[-1], 1, width, width)
    if second.bias is not None:
        out = out + second.bias[expert, :width].to(x.dtype)
    if module.post_expert_norm is not None:
        out = module.post_expert_norm(out)
    out = torch.where(is_ours[:, None], out.float() * weights.reshape(-1, 1).float(), 0.0)
    return out.view(*index.shape, width).sum(1).to(x.dtype)
