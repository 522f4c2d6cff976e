"""``load_quantized_model``: the weights of a checkpoint into a model that the caller has made."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch

from graftq.plugin import import_hooks
from graftq.plugin.checkpoint.configuration import QUANTIZE_CONFIG, read_written
from graftq.plugin.checkpoint.source import Source

logger = logging.getLogger("graftq")


def load_quantized_model(
    model: Any,
    save_folder: str,
    backend: str = "auto",
    quant_config_name: str = QUANTIZE_CONFIG,
    state_dict_name: str | None = None,
    device_map: Any = None,
    max_memory: dict[Any, Any] | None = None,
    no_split_module_classes: Any = None,
    offload_folder: str | None = None,
    offload_buffers: bool | None = None,
    offload_state_dict: bool = False,
) -> Any:
    """Load a GPTQ checkpoint into ``model``, by transformers' ``from_pretrained``, with all of graftq's checks.

    Args:
        model: A model of transformers, on the meta device or not; its weights are dropped.
        save_folder: The checkpoint.
        backend: Without meaning; graftq chooses its kernels.
        quant_config_name: The file with the parameters, if neither the model's nor the folder's configuration has any.
        state_dict_name: The weight file, if it is to be a certain one.
        device_map: As in transformers; without one, the current GPU or, where there is none, the CPU.
        max_memory: As in transformers.
        no_split_module_classes: Without meaning; transformers knows them.
        offload_folder: As in transformers.
        offload_buffers: As in transformers.
        offload_state_dict: Without meaning; weights are read one by one.

    Returns:
        ``model``.

    Raises:
        TypeError: if ``model`` is not one of transformers.
        ValueError: if there are no parameters.
        graftq.quant_linear.errors.CheckpointError: if the checkpoint cannot be loaded right.
    """
    from transformers import PreTrainedModel

    import_hooks.require("transformers.quantizers.auto", "transformers.modeling_utils")
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"{type(model).__name__} is no model of transformers")
    if str(getattr(backend, "value", backend)).lower() not in ("auto", "auto_trainable"):
        logger.warning("graftq: load_quantized_model ignores backend=%r: graftq chooses its kernels", backend)
    config = copy.deepcopy(model.config)
    if getattr(config, "quantization_config", None) is None:
        written = read_written(Source(str(save_folder)), name=quant_config_name)
        if not written:
            raise ValueError(f"{save_folder}: neither {quant_config_name} nor quantization parameters in config.json")
        config.quantization_config = dict(next(iter(written.values())))
    if state_dict_name is not None:
        config.transformers_weights = state_dict_name
    if device_map is None:
        device_map = {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}
    places: dict[str, Any] = {
        "max_memory": max_memory,
        "offload_folder": offload_folder,
        "offload_buffers": offload_buffers,
    }
    loaded = type(model).from_pretrained(
        save_folder,
        config=config,
        dtype=model.dtype,
        device_map=device_map,
        **{name: value for name, value in places.items() if value is not None},
    )
    if model.can_generate():
        loaded.generation_config = model.generation_config
    # Callers may keep the model that they gave instead of the one that they get; it must not stay an empty one.
    vars(model).clear()
    vars(model).update(vars(loaded))
    return model
