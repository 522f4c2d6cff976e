"""Puts packed layers where a plan says, in a model that is still on the meta device."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D

from graftq.adapters.transformers.plan import Plan, Projection
from graftq.plugin.manager import choose_experts_kernel, choose_kernel
from graftq.quant_linear.checkpoint import torch_dtypes
from graftq.quant_linear.experts import QuantExpert, QuantExperts
from graftq.quant_linear.layouts import GptqTensors
from graftq.quant_linear.linear import QuantLinear
from graftq.quant_linear.packing import dequantize
from graftq.quant_linear.spec import QuantSpec


def swap_modules(model: Any, plan: Plan) -> dict[str, Projection]:
    """Replace linear layers and experts modules.

    Returns:
        The projections whose module is neither (a router, say, that multiplies by its own parameter):
        these are to be dequantised while loading.
    """
    dense = {}
    for target, projection in plan.projections.items():
        if projection.container:
            continue
        if isinstance(model.get_submodule(target), (nn.Linear, Conv1D)):
            model.set_submodule(target, _linear(projection, model.config.dtype))
            model.all_tied_weights_keys.pop(f"{target}.weight", None)
        else:
            dense[target] = projection
    for container, found in plan.containers().items():
        model.set_submodule(container, _experts(model.get_submodule(container), found, model.config.dtype))
    if ignored := [projection.target for projection in plan.projections.values() if _has_idle_bias(projection)]:
        # AutoGPTQ writes a bias of zeros for every layer; the checks have made sure that they are zeros.
        patterns = {_any_layer(target, model.base_model_prefix) + r"\.bias$" for target in ignored}
        model._keys_to_ignore_on_load_unexpected = set(model._keys_to_ignore_on_load_unexpected or ()) | patterns
    return dense


def _linear(projection: Projection, dtype: torch.dtype) -> QuantLinear:
    known = torch_dtypes()
    dtypes = {suffix: known[info.dtype] for suffix, info in projection.infos.items()}
    if not projection.spec.has_bias:
        dtypes.pop("bias", None)
    return QuantLinear(projection.spec, choose_kernel, dtypes, dtype, device="meta")


def _experts(stock: Any, found: Mapping[str, Projection], dtype: torch.dtype) -> QuantExperts:
    """Rebuild an experts module around packed projections; gating, activation and norm stay the model's own."""
    gated = hasattr(stock, "gate_up_proj")
    projections: dict[str, dict[str, QuantLinear]] = {}
    for name, projection in found.items():
        number, _, own = name.partition(".")
        projections.setdefault(number, {})[own] = _linear(projection, dtype)
    # Where the files hold one bias tensor for all experts, it stays what it is in the model.
    up, down = "gate_up_proj" if gated else "up_proj", "down_proj"
    packed_biases = {name.endswith(f".{down}") for name, projection in found.items() if projection.spec.has_bias}
    fused_biases = {
        argument: (f"{name}_bias", getattr(stock, f"{name}_bias"))
        for argument, name in (("up_bias", up), ("down_bias", down))
        if stock.has_bias and (name == down) not in packed_biases
    }
    for name in ("gate_up_proj", "up_proj", "down_proj"):
        stock._parameters.pop(name, None)
    return QuantExperts(
        [QuantExpert(projections[str(number)]) for number in range(stock.num_experts)],
        choose_experts_kernel,
        activate=stock._apply_gate if gated else stock.act_fn,
        is_concatenated=stock.is_concatenated,
        post_expert_norm=stock.post_expert_norm if getattr(stock, "has_post_expert_norm", False) else None,
        **fused_biases,
    )


def _has_idle_bias(projection: Projection) -> bool:
    return "bias" in projection.infos and not projection.spec.has_bias


def _any_layer(target: str, base: str) -> str:
    """A pattern for ``target`` in every layer and expert, with or without the base model's prefix."""
    return re.sub(r"\d+", r"\\d+", re.escape(target.removeprefix(f"{base}.")))


class Dequantize(ConversionOps):
    """Turns the packed tensors of one module into its plain weight, as transformers' loader hands them over."""

    def __init__(self, specs: Mapping[str, QuantSpec], hf_quantizer: Any):
        self.specs = specs
        self.hf_quantizer = hf_quantizer  # tells the loader to leave the dtypes of the inputs alone

    def __deepcopy__(self, memo: dict[int, Any]) -> Dequantize:
        return self  # the loader copies a converter for every module; specs and quantiser are shared

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        """Collect by suffix, dequantise in float32, cast to the parameter's dtype."""
        parts = {pattern.rstrip("$").rpartition(".")[2]: value for pattern, value in input_dict.items()}
        tensors = {name: value[0] if isinstance(value, list) else value for name, value in parts.items()}
        name = kwargs["full_layer_name"]
        weight = dequantize(GptqTensors(**tensors), self.specs[name.removesuffix(".weight")])
        return {target_patterns[0]: weight.to(kwargs["model"].get_parameter(name).dtype).contiguous()}
