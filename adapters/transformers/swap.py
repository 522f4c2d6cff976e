"""Puts packed layers where a plan says, in a model that is still on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D

from graftq.adapters.transformers.packed_layers import PlacedProjection, idle_biases, kept_dtype, plain_weight
from graftq.adapters.transformers.placement import Placement
from graftq.plugin.manager import choose_kernel
from graftq.quant_linear.experts import QuantExpert, QuantExperts
from graftq.quant_linear.layouts import GptqTensors
from graftq.quant_linear.linear import QuantLinear
from graftq.quant_linear.spec import QuantSpec


def swap_modules(model: Any, plan: Placement, plain: dict[str, nn.Module]) -> dict[str, PlacedProjection]:
    """Replace linear layers and experts modules.

    Args:
        model: The skeleton, on the meta device.
        plan: What goes where.
        plain: Gets the modules that were replaced, without their weights, by name.

    Returns:
        The projections whose module is neither (a router, say, that multiplies by its own parameter):
        these are to be dequantized while loading.
    """
    dense = {}
    dtype = model.config.dtype or model.dtype
    kept = model._get_dtype_plan(dtype)
    for target, projection in plan.projections.items():
        if projection.container:
            continue
        stock = model.get_submodule(target)
        if isinstance(stock, (nn.Linear, Conv1D)):
            plain[target] = stock
            model.set_submodule(target, projection.empty(dtype, kept_dtype(kept, f"{target}.weight")))
            model.all_tied_weights_keys.pop(f"{target}.weight", None)
        else:
            dense[target] = projection
    for container, found in plan.containers().items():
        plain[container] = model.get_submodule(container)
        wanted = kept_dtype(kept, f"{container}.down_proj")
        model.set_submodule(container, _experts(plain[container], found, dtype, wanted))
    idle = idle_biases(plan.projections, model.base_model_prefix)
    model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *idle}
    return dense


def _experts(
    stock: Any, found: Mapping[str, PlacedProjection], dtype: torch.dtype, kept: torch.dtype | None
) -> QuantExperts:
    """Rebuild an experts module around packed projections; gating, activation and norm stay the model's own."""
    gated = hasattr(stock, "gate_up_proj")
    projections: dict[str, dict[str, QuantLinear]] = {}
    for name, projection in found.items():
        number, _, own = name.partition(".")
        projections.setdefault(number, {})[own] = projection.empty(dtype, kept)
    # Where the files hold one bias tensor for all experts, it stays what it is in the model.
    up, down = "gate_up_proj" if gated else "up_proj", "down_proj"
    packed_biases = {name.endswith(f".{down}") for name, projection in found.items() if projection.spec.has_bias}
    fused_biases = {
        argument: (f"{name}_bias", getattr(stock, f"{name}_bias"))
        for argument, name in (("up_bias", up), ("down_bias", down))
        if stock.has_bias and (name == down) not in packed_biases
    }
    for name in stock._parameters.keys() & {"gate_up_proj", "up_proj", "down_proj"}:
        stock._parameters[name] = None  # its place remains, in case it is dequantized
    return QuantExperts(
        [QuantExpert(projections[str(number)]) for number in range(stock.num_experts)],
        choose_kernel,
        activate=_Gate(stock) if gated else stock.act_fn,
        is_concatenated=stock.is_concatenated,
        post_expert_norm=stock.post_expert_norm if getattr(stock, "has_post_expert_norm", False) else None,
        **fused_biases,
    )


@dataclass(frozen=True)
class _Gate:
    """What a stock experts module does between its projections; its own bound method cannot be pickled."""

    experts: Any

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts._apply_gate(x)


class Dequantize(ConversionOps):
    """Turns the packed tensors of one module into its plain weight, as transformers' loader hands them over."""

    def __init__(
        self, specs: Mapping[str, QuantSpec], kept: dict[str, tuple[GptqTensors, QuantSpec]], hf_quantizer: Any
    ):
        self.specs = specs
        self.kept = kept  # gets what was packed, by module, for saving: these modules are small
        self.hf_quantizer = hf_quantizer  # tells the loader to leave the dtypes of the inputs alone

    def __deepcopy__(self, memo: dict[int, Any]) -> Dequantize:
        return self  # the loader copies a converter for every module; specs and quantizer are shared

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        """Collect by suffix, dequantize in float32, cast to the parameter's dtype."""
        parts = {pattern.rstrip("$").rpartition(".")[2]: value for pattern, value in input_dict.items()}
        tensors = {name: value[0] if isinstance(value, list) else value for name, value in parts.items()}
        name = kwargs["full_layer_name"]
        module = name.removesuffix(".weight")
        packed, spec = GptqTensors(**tensors), self.specs[module]
        weight = plain_weight(kwargs["model"].get_submodule(module), packed, spec)
        self.kept[module] = GptqTensors(**{name: tensor.cpu() for name, tensor in tensors.items()}), spec
        return {target_patterns[0]: weight.to(kwargs["model"].get_parameter(name).dtype).contiguous()}
