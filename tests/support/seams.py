"""The six places of transformers that graftq replaces, as a fresh interpreter finds them."""

from __future__ import annotations

from typing import Any


def seams() -> dict[str, Any]:
    """What stands in each place now."""
    from transformers import modeling_utils
    from transformers.quantizers import auto

    return {
        "AUTO_QUANTIZER_MAPPING": auto.AUTO_QUANTIZER_MAPPING["gptq"],
        "AUTO_QUANTIZATION_CONFIG_MAPPING": auto.AUTO_QUANTIZATION_CONFIG_MAPPING["gptq"],
        "from_pretrained": vars(modeling_utils.PreTrainedModel)["from_pretrained"].__func__,
        "get_hf_quantizer": modeling_utils.get_hf_quantizer,
        "_get_resolved_checkpoint_files": modeling_utils._get_resolved_checkpoint_files,
        "save_pretrained": vars(modeling_utils.PreTrainedConfig)["save_pretrained"],
    }


def taken_over() -> list[bool]:
    """For each place, whether graftq's function or class stands there."""
    return ["_graftq" in vars(value) for value in seams().values()]


def state() -> str:
    """ "all", "none" or "some" of the places are taken over."""
    taken = taken_over()
    return "all" if all(taken) else "some" if any(taken) else "none"
