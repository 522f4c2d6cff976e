"""Everything that the adapter takes from vLLM, and where vLLM keeps it: the one place to change when modules move.

Each name is imported when it is first asked for, since :func:`graftq.adapters.vllm.register` runs before vLLM has
imported its layers.
"""

from __future__ import annotations

from typing import Any

from graftq.adapters.serving.lookup import look_up
from graftq.adapters.vllm import versions

_LAYERS = "vllm.model_executor.layers"

HOMES = {
    "AutoGPTQConfig": f"{_LAYERS}.quantization.auto_gptq",
    "AutoGPTQLinearMethod": f"{_LAYERS}.quantization.auto_gptq",
    "FusedMoEMethodBase": f"{_LAYERS}.fused_moe",
    "LinearBase": f"{_LAYERS}.linear",
    "LinearMethodBase": f"{_LAYERS}.linear",
    "ParallelLMHead": f"{_LAYERS}.vocab_parallel_embedding",
    "QUANTIZATION_METHODS": f"{_LAYERS}.quantization",
    "QuantizationConfig": f"{_LAYERS}.quantization.base_config",
    "QuantizeMethodBase": f"{_LAYERS}.quantization.base_config",
    "RoutedExperts": f"{_LAYERS}.fused_moe",
    "UnquantizedLinearMethod": f"{_LAYERS}.linear",
    "WeightsMapper": "vllm.model_executor.models.utils",
    "get_current_vllm_config_or_none": "vllm.config",
    "get_forward_context": "vllm.forward_context",
    "get_safetensors_params_metadata": "vllm.transformers_utils.config",
    "register_quantization_config": f"{_LAYERS}.quantization",
}


def __getattr__(name: str) -> Any:
    """One of :data:`HOMES`.

    Raises:
        RuntimeError: if this vLLM does not have it there, naming the versions that do.
    """
    return look_up(name, HOMES, f"vLLM {versions.installed()}", versions.RANGE)
