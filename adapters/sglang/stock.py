"""Everything that the adapter takes from SGLang, and where SGLang keeps it: the one place to change when it moves."""

from __future__ import annotations

from typing import Any

from graftq.adapters.serving.lookup import look_up
from graftq.adapters.sglang import versions

_LAYERS = "sglang.srt.layers"
_QUANTIZATION = f"{_LAYERS}.quantization"

HOMES = {
    "CPU_QUANTIZATION_METHODS": _QUANTIZATION,
    "CPUGPTQConfig": f"{_QUANTIZATION}.gptq",
    "FusedMoE": f"{_LAYERS}.moe.fused_moe_triton",
    "FusedMoEMethodBase": f"{_QUANTIZATION}.base_config",
    "GPTQMarlinConfig": f"{_QUANTIZATION}.gptq",
    "HookRegistry": "sglang.srt.plugins.hook_registry",
    "HookType": "sglang.srt.plugins.hook_registry",
    "LinearBase": f"{_LAYERS}.linear",
    "LinearMethodBase": f"{_QUANTIZATION}.base_config",
    "ParallelLMHead": f"{_LAYERS}.vocab_parallel_embedding",
    "QUANTIZATION_METHODS": _QUANTIZATION,
    "QuantizationConfig": f"{_QUANTIZATION}.base_config",
    "StandardCombineInput": f"{_LAYERS}.moe.token_dispatcher",
    "UnquantizedLinearMethod": f"{_QUANTIZATION}.unquant",
    "_check_cpu_amx_support": f"{_QUANTIZATION}.gptq.schemes.gptq_cpu",
    "add_quantization_method_choices": "sglang.srt.server_args",
    "cpu_has_amx_support": "sglang.srt.utils",
    "get_global_expert_location_metadata": "sglang.srt.eplb.expert_location",
    "get_group_rank_size": "sglang.srt.distributed.utils",
    "get_moe_a2a_backend": f"{_LAYERS}.moe",
    "get_moe_runner_backend": f"{_LAYERS}.moe",
    "get_server_args": "sglang.srt.runtime_context",
    "is_cpu": "sglang.srt.utils",
    "is_cuda": "sglang.srt.utils",
    "is_hip": "sglang.srt.utils",
}


def __getattr__(name: str) -> Any:
    """One of :data:`HOMES`.

    Raises:
        RuntimeError: if this SGLang does not have it there, naming the version that does.
    """
    return look_up(name, HOMES, f"SGLang {versions.installed()}", versions.RANGE)
