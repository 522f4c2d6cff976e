"""The places of PEFT that graftq replaces, each by a thin function around the original.

``LoraConfig._register_custom_module`` is PEFT's own interface for foreign layers, but it has to be called on each
configuration, and it covers only modules that PEFT finds by itself.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import nn

from graftq.plugin.patching import replace_attribute
from graftq.quant_linear.experts import QuantExperts
from graftq.quant_linear.linear import QuantLinear
from graftq.quant_linear.offloaded import home


def patch_config(module: ModuleType) -> None:
    """Register graftq's layers with every LoRA configuration."""
    replace_attribute(module.LoraConfig, "__post_init__", _register_layers)


def patch_model(module: ModuleType) -> None:
    """Avoid reading a packed layer's weight, which is dequantized at each access."""
    replace_attribute(module.LoraModel, "_replace_module", _replace_quietly)


def patch_wrappers(module: ModuleType) -> None:
    """Let no packed layer be trained as a whole."""
    from graftq.adapters.peft.methods import refuse_training

    replace_attribute(module.AuxiliaryTrainingWrapper, "__init__", refuse_training)


def patch_peft_model(module: ModuleType) -> None:
    """Let adapters be loaded on offloaded layers, and none on AutoGPTQ's object that is for the model inside."""
    from graftq.adapters.peft.offloaded import keep_places, keep_places_of_loaded

    replace_attribute(module.PeftModel, "from_pretrained", keep_places)
    replace_attribute(
        module.PeftModel, "load_adapter", lambda original: _refuse_unfound(keep_places_of_loaded(original))
    )


def patch_tuners(module: ModuleType) -> None:
    """Let ``target_modules="all-linear"``, ``target_parameters`` and methods other than LoRA find packed layers."""
    from graftq.adapters.peft.methods import look_at_linear, put_around
    from graftq.adapters.peft.offloaded import refuse_lost

    replace_attribute(module, "_maybe_include_all_linear_layers", _include_packed_layers)
    replace_attribute(module.BaseTuner, "__init__", look_at_linear)
    replace_attribute(module.BaseTuner, "inject_adapter", lambda original: refuse_lost(put_around(original)))
    replace_attribute(module.BaseTuner, "_replace_module", _replace_quietly)
    replace_attribute(module.BaseTuner, "_inject_parameters", _inject_into_experts)


def patch_adaption_prompt(module: ModuleType) -> None:
    """Let adaption prompts find the device of an attention module that has nothing but packed layers."""
    replace_attribute(module._BaseAdaptedAttention, "__init__", _with_a_parameter)


def _with_a_parameter(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def __init__(self: Any, model_type: str, adapter_len: int, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        device = next((tensor.device for tensor in model.buffers()), None)
        lends = device is not None and next(model.parameters(), None) is None
        if lends:  # PEFT looks at the first parameter, and packed tensors are buffers
            model.register_parameter("_graftq_device", nn.Parameter(torch.empty(0, device=device), requires_grad=False))
        try:
            original(self, model_type, adapter_len, model, *args, **kwargs)
        finally:
            if lends:
                del model._graftq_device

    return __init__


def _register_layers(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def __post_init__(self: Any) -> None:
        from graftq.adapters.peft.lora import PackedExperts, PackedLinear  # needs PEFT's layers, imported after this

        original(self)
        self._register_custom_module({QuantLinear: PackedLinear, QuantExperts: PackedExperts})

    return __post_init__


def _replace_quietly(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def _replace_module(self: Any, parent: nn.Module, child_name: str, new_module: nn.Module, child: Any) -> None:
        base = child.get_base_layer() if hasattr(child, "get_base_layer") else child
        if isinstance(base, (QuantLinear, QuantExperts)):
            device = home(base)
            setattr(parent, child_name, new_module)
            for name, module in new_module.named_modules():
                is_adapters = self.prefix in name or "ranknum" in name
                if is_adapters and not any(parameter.is_meta for parameter in module.parameters()):
                    module.to(device)
        else:
            original(self, parent, child_name, new_module, child)

    return _replace_module


def _include_packed_layers(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _maybe_include_all_linear_layers(peft_config: Any, model: nn.Module) -> Any:
        asked = getattr(peft_config, "target_modules", None)
        peft_config = original(peft_config, model)
        if isinstance(asked, str) and not isinstance(peft_config.target_modules, str):
            peft_config.target_modules = {*peft_config.target_modules, *_packed_layers(model)}
        return peft_config

    return _maybe_include_all_linear_layers


def _packed_layers(model: Any) -> list[str]:
    """Packed linear layers except the head and those of experts, which PEFT adapts only as parameters."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    inside = [f"{name}." for name, module in model.named_modules() if isinstance(module, QuantExperts)]
    return [
        name.removesuffix(".base_layer")
        for name, module in model.named_modules()
        if isinstance(module, QuantLinear) and module is not head and not name.startswith(tuple(inside))
    ]


def _inject_into_experts(original: Callable[..., list[str]]) -> Callable[..., list[str]]:
    @functools.wraps(original)
    def _inject_parameters(
        self: Any, peft_config: Any, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        from accelerate import init_empty_weights
        from peft.utils import _get_submodules

        from graftq.adapters.peft.lora import parameters_of, wrapper_of

        found = original(self, peft_config, model, adapter_name, low_cpu_mem_usage)
        wanted = tuple(f".{name}" for name in peft_config.target_parameters)
        packed = [(name, module) for name, module in model.named_modules() if isinstance(module, QuantExperts)]
        for name, experts in packed:
            place = name.replace(".base_layer", "")
            for parameter in parameters_of(experts):
                if not f".{place}.{parameter}".endswith(wanted):
                    continue
                parent, outermost, leaf = _get_submodules(model, place)
                self._check_target_module_compatiblity(peft_config, model, leaf)
                with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                    self._create_and_replace(
                        peft_config,
                        adapter_name,
                        wrapper_of(outermost, parameter) or outermost,
                        leaf,
                        parent,
                        current_key=f"{place}.{parameter}",
                        parameter_name=parameter,
                    )
                found.append(f"{place}.{parameter}")
        return found

    return _inject_parameters


def _refuse_unfound(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        loaded = original(self, *args, **kwargs)
        lost = next(iter(loaded.unexpected_keys), "")
        base = self.get_base_model()
        if lost and _is_autogptq(base):
            raise ValueError(
                f"the adapter has {lost}, for which AutoGPTQ's object has no place: the model is one level further "
                "down; use `.model`: PeftModel.from_pretrained(quantized.model, ...)"
            )
        if lost.startswith("base_model.model.model.model.") and any(isinstance(m, QuantLinear) for m in base.modules()):
            raise ValueError(
                f"the adapter has {lost}, for which the model has no place: it was trained on the object that "
                "AutoGPTQ's from_quantized returns; put it on that, not on its `.model`"
            )
        return loaded

    return load_adapter


def _is_autogptq(model: Any) -> bool:
    door = sys.modules.get("graftq.adapters.auto_gptq.modeling")  # not imported: then the model is none
    return door is not None and isinstance(model, door.BaseGPTQForCausalLM)
