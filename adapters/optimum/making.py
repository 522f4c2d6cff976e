"""``GPTQQuantizer.quantize_model`` and ``save``: by graftq's quantizer for transformers."""

from __future__ import annotations

from typing import Any

from graftq.plugin import import_hooks

TAKEN = (
    "bits",
    "dataset",
    "group_size",
    "damp_percent",
    "desc_act",
    "act_group_aware",
    "sym",
    "true_sequential",
    "model_seqlen",
    "block_name_to_quantize",
    "batch_size",
    "modules_in_block_to_quantize",
    "format",
    "meta",
)
"""Attributes that mean the same in ``GPTQConfig``."""

WITHOUT_MEANING = (
    "tokenizer",  # an argument of quantize_model
    "quant_method",
    "use_cuda_fp16",
    "max_input_length",
    "disable_exllama",
    "use_exllama",
    "exllama_config",
)
"""Those that choose kernels, or come along where a dictionary of parameters is passed."""


def quantizes(quantizer: Any) -> bool:
    """Whether graftq quantizes for this ``GPTQQuantizer``: not if it names a backend, as only GPTQModel has any."""
    from importlib.metadata import version

    known = tuple(int(part) for part in version("transformers").split(".")[:2]) >= (5, 16)
    return known and quantizer.backend in (None, "auto")


def quantize_model(quantizer: Any, model: Any, tokenizer: Any = None) -> Any:
    """Quantize a float model in place, and return it; it is then as if it had been loaded packed.

    Args:
        quantizer: Says how.
        model: A model of transformers.
        tokenizer: A tokenizer, or where to load one; None for the model's own.

    Raises:
        TypeError: if this is no model of transformers.
        ValueError: for an argument that graftq has no meaning for, without a data set, or if the model cannot be
            quantized.
        RuntimeError: if graftq is switched off, or has failed to take over transformers.
    """
    import_hooks.require("transformers.quantizers.auto", "transformers.modeling_utils")
    from transformers import GPTQConfig, PreTrainedModel
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"{type(model).__name__} is no model of transformers")
    if getattr(model, "is_quantized", False):
        raise ValueError("this model is quantized already")
    if quantizer.dataset is None:
        raise ValueError("GPTQQuantizer has no `dataset` to quantize with: pass a list of texts")
    modules = dict(model.named_modules())
    for name in quantizer.module_name_preceding_first_block or ():
        if name not in modules:
            raise ValueError(f"module_name_preceding_first_block: {name}: no such module in this model")
    extra = {key: value for key, value in quantizer.graftq_extra.items() if key not in WITHOUT_MEANING}
    config: Any = GPTQConfig(tokenizer=tokenizer, **{name: getattr(quantizer, name) for name in TAKEN}, **extra)
    unknown = sorted(name for name in extra if not hasattr(config, name))
    if unknown:
        raise ValueError(f"GPTQQuantizer: no argument {', '.join(unknown)}")
    AUTO_QUANTIZER_MAPPING["gptq"](config, pre_quantized=False).postprocess_model(model)
    return model


def is_packed_by_graftq(model: Any) -> bool:
    """Whether ``save_pretrained`` alone writes a checkpoint of this model, its parameters included."""
    from graftq.quant_linear.experts import QuantExperts
    from graftq.quant_linear.linear import QuantLinear

    if getattr(model, "hf_quantizer", None) is None:  # made of convert_model's layers
        return False
    return any(isinstance(module, (QuantLinear, QuantExperts)) for module in model.modules())


def save(model: Any, save_dir: Any, max_shard_size: str = "10GB", safe_serialization: bool = True) -> None:
    """Write a packed model: weights, ``config.json``, and ``quantize_config.json`` without the calibration texts.

    Args:
        model: The model.
        save_dir: A folder.
        max_shard_size: As in ``save_pretrained``.
        safe_serialization: Must be True.

    Raises:
        ValueError: if pickles are asked for.
    """
    if not safe_serialization:
        raise ValueError("safe_serialization=False: graftq writes safetensors only")
    model.save_pretrained(save_dir, max_shard_size=max_shard_size)
