"""``from_pretrained`` and ``quantize(examples)``: by graftq's quantizer for transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import GPTQConfig

from graftq.adapters.auto_gptq.quantize_config import BaseQuantizeConfig
from graftq.plugin import import_hooks


def quantize(model: Any, parameters: BaseQuantizeConfig, examples: Sequence[Any], batch_size: int) -> None:
    """Quantize a float model in place; it is then as if it had been loaded packed.

    Args:
        model: A model of transformers.
        parameters: How.
        examples: Mappings with ``input_ids`` and ``attention_mask``, of tensors or lists.
        batch_size: Rows that run at once, at least.

    Raises:
        ValueError: if the examples are none, or the model cannot be quantized.
        RuntimeError: if graftq is switched off, or has failed to take over transformers.
    """
    import_hooks.require("transformers.quantizers.auto", "transformers.modeling_utils")
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    config: Any = GPTQConfig(
        bits=parameters.bits,
        dataset=list(examples),
        group_size=parameters.group_size,
        damp_percent=parameters.damp_percent,
        desc_act=parameters.desc_act,
        act_group_aware=not parameters.desc_act,  # AutoGPTQ has no such thing; here it costs nothing
        sym=parameters.sym,
        true_sequential=parameters.true_sequential,
        format=parameters.checkpoint_format,
        batch_size=batch_size,
    )
    config.static_groups = parameters.static_groups
    AUTO_QUANTIZER_MAPPING["gptq"](config, pre_quantized=False).postprocess_model(model)
