"""The places of the server that graftq replaces, each by a thin function or class around the original.

All are looked up at each use or are attributes of classes, so the order of imports does not matter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from graftq.adapters.tgi import server_log
from graftq.adapters.tgi.model_files import asked_for, is_gptq
from graftq.plugin.patching import replace_attribute


def _patch_quantization(module: ModuleType) -> None:
    """``get_loader`` reads both names from its module."""
    server_log.forward()
    replace_attribute(module, "_get_quantizer_config", _remember_model)
    replace_attribute(module, "can_use_gptq_marlin", _no_marlin)


def _remember_model(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _get_quantizer_config(model_id: str, revision: str | None) -> Any:
        asked_for.set((model_id, revision))
        return original(model_id, revision)

    return _get_quantizer_config


def _no_marlin(original: Callable[..., bool]) -> Callable[..., bool]:
    @functools.wraps(original)
    def can_use_gptq_marlin(*, quant_method: str, quantize: str, **rest: Any) -> bool:
        if is_gptq(quantize, quant_method):
            return False
        return original(quant_method=quant_method, quantize=quantize, **rest)

    return can_use_gptq_marlin


def _patch_gptq(module: ModuleType) -> None:
    """A subclass, because model code tests ``isinstance(loader, GPTQWeightsLoader)``."""
    from graftq.adapters.tgi.loader import PackedLoader

    replace_attribute(
        module, "GPTQWeightsLoader", lambda stock: type(stock.__name__, (PackedLoader, stock), {"__module__": __name__})
    )


def _patch_making(module: ModuleType) -> None:
    """``text-generation-server quantize`` imports the function when it is called."""
    from graftq.adapters.tgi.quantizing import make_natively

    server_log.forward()
    replace_attribute(module, "quantize", make_natively)


def _patch_moe(module: ModuleType) -> None:
    """The class itself stays: model code has imported it by name."""
    layer = module.SparseMoELayer
    replace_attribute(layer, "is_supported", _supports_packed)
    replace_attribute(layer, "__init__", _take_packed)


def _supports_packed(original: Any) -> Any:
    stock = original.__func__

    @functools.wraps(stock)
    def is_supported(weights: Any) -> bool:
        return _is_ours(weights.loader) or stock(weights)

    return staticmethod(is_supported)


def _take_packed(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def __init__(self: Any, **kwargs: Any) -> None:
        weights = kwargs["weights"]
        if not _is_ours(weights.loader):
            original(self, **kwargs)
            return
        from torch import nn

        from graftq.adapters.tgi.moe import PackedMoE

        gate = f"{kwargs['prefix']}.0.{kwargs.get('gate_proj_name', 'gate_proj')}"
        if weights.loader.is_packed(weights, gate):
            nn.Module.__init__(self)
            self.moe = PackedMoE(**kwargs)
        else:  # experts that were left out of quantization
            from text_generation_server.layers.fp8 import HybridFP8UnquantLoader

            with weights.use_loader(HybridFP8UnquantLoader(None, to_fp8=False)):
                original(self, **kwargs)

    return __init__


def _is_ours(loader: Any) -> bool:
    return getattr(loader, "checkpoint", None) is not None


def _patch_gpt_neox(module: ModuleType) -> None:
    from graftq.adapters.tgi.gpt_neox import reorder_packed

    replace_attribute(module, "load_qkv", reorder_packed)


def _patch_causal_lm(module: ModuleType) -> None:
    """The server's path without flash attention, on which transformers loads the model."""
    from graftq.adapters.tgi import fallback, newer_transformers

    server_log.forward()
    newer_transformers.restore_video_input()
    replace_attribute(module.CausalLM, "fallback", functools.partial(fallback.serve_gptq, module))


PATCHES: Mapping[str, Callable[[ModuleType], None]] = {
    "models.causal_lm": _patch_causal_lm,
    "utils.quantization": _patch_quantization,
    "layers.gptq": _patch_gptq,
    "layers.gptq.quantize": _patch_making,
    "layers.moe": _patch_moe,
    "models.custom_modeling.flash_neox_modeling": _patch_gpt_neox,
}
"""By the module's name inside ``text_generation_server``."""
