"""What registering changes in SGLang: one more quantization method, before the others, and three hooks."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from graftq.adapters.serving.served_config import METHOD
from graftq.adapters.sglang import stock
from graftq.adapters.sglang.config import TAKEOVER, GraftqConfig
from graftq.quant_linear.errors import CheckpointError

LISTED = "gptq_marlin"
"""A method for which SGLang runs Mixtral's experts as one; for those that it does not list, one by one."""


def take_over() -> bool:
    """Register the method and the hooks; False if there is nothing to do.

    Raises:
        RuntimeError: if this SGLang lacks something that the adapter needs.
    """
    methods = stock.QUANTIZATION_METHODS
    if METHOD in methods or not TAKEOVER.choice():
        return False
    if not (stock.is_cuda() or stock.is_cpu() or stock.is_hip()):  # no kernel of ours runs on the others
        return False
    registry, kinds = stock.HookRegistry, stock.HookType
    registry.register("sglang.srt.model_loader.weight_utils.get_quant_config", _locate, kinds.AFTER)
    registry.register("sglang.srt.model_loader.loader._initialize_model", _check_model, kinds.AFTER)
    registry.register("sglang.srt.model_loader.utils.get_model_architecture", _fuse_mixtral, kinds.AROUND)
    if stock.is_hip():
        verify = "sglang.srt.configs.model_config.ModelConfig._verify_quantization"
        registry.register(verify, _allow_on_rocm, kinds.AROUND)
    others = dict(methods)
    methods.clear()  # changed in place, since others hold this table; the first method that takes a checkpoint has it
    methods.update({METHOD: GraftqConfig, **others})
    stock.CPU_QUANTIZATION_METHODS[METHOD] = GraftqConfig
    stock.add_quantization_method_choices([METHOD])
    return True


def _locate(config: Any, model_config: Any, load_config: Any, *others: Any, **named: Any) -> None:
    """Tell a configuration where its checkpoint is."""
    if isinstance(config, GraftqConfig):
        hub = {"revision": model_config.revision, "cache_dir": load_config.download_dir}
        config.locate(model_config.model_path, {key: value for key, value in hub.items() if value is not None})


def _check_model(
    model: Any, model_config: Any, load_config: Any, quant_config: Any = None, *others: Any, **named: Any
) -> None:
    """Refuse a model that keeps a layer unquantized whose files are packed: SGLang would only warn, and answer noise.

    Raises:
        CheckpointError: naming the layer.
    """
    if not isinstance(quant_config, GraftqConfig):
        return
    kinds = (stock.LinearBase, stock.FusedMoE, stock.ParallelLMHead)
    for name, layer in model.named_modules():
        if isinstance(layer, kinds) and not quant_config.is_ours(layer.quant_method):
            module = _packed(quant_config, name, isinstance(layer, stock.FusedMoE))
            if module:
                reason = f"packed, but SGLang's {type(model).__name__} keeps {name} unquantized"
                raise quant_config.stored.explain(CheckpointError(reason, module=module))


def _packed(config: GraftqConfig, name: str, is_experts: bool) -> str:
    """A packed module that a layer should have had; "" if there is none."""
    if not is_experts:
        return next(iter(config.projections(name)), "")
    block = re.search(r"[^.]+\.\d+\.", name)  # "layers.3."
    parts = (".experts.",) if block is None else (block[0], ".experts.")
    unclaimed = (stored for stored in config.stored.quantized.values() if stored not in config.claimed)
    return next((stored for stored in unclaimed if all(part in stored for part in parts)), "")


def _fuse_mixtral(original: Callable[[Any], Any], model_config: Any) -> Any:
    """Look a model up as for a method that SGLang lists."""
    if model_config.quantization != METHOD:
        return original(model_config)
    model_config.quantization = LISTED
    try:
        return original(model_config)
    finally:
        model_config.quantization = METHOD


def _allow_on_rocm(original: Callable[[Any], Any], model_config: Any) -> Any:
    """SGLang's list for ROCm has no method for GPTQ; ours runs there."""
    try:
        return original(model_config)
    except ValueError as error:
        if model_config.quantization != METHOD or "ROCm" not in str(error):
            raise
    return None
