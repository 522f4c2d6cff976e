"""What graftq replaces of transformers' loading and saving, each by a thin function around the original."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from graftq.adapters.transformers.attention import patch_attention
from graftq.adapters.transformers.loading import Files, Loading, current, remember_source, resolve_by
from graftq.adapters.transformers.offloaded import load_adapter_in_place
from graftq.adapters.transformers.overwriting import replacing
from graftq.adapters.transformers.parameters import as_parameters, refuse_no_object
from graftq.adapters.transformers.quantizer import GptqHfQuantizer
from graftq.adapters.transformers.registry import GPTQConfig, register
from graftq.adapters.transformers.saving import is_packed, without_label, write_parameters
from graftq.adapters.transformers.tensor_parallel import keep_whole_in_stated
from graftq.plugin.checkpoint.unlabeled import packed_name
from graftq.plugin.patching import replace_attribute


def patch_quantizers(module: ModuleType) -> None:
    """Replace the stock quantizer and configuration class for "gptq" by graftq's."""
    register(module, GptqHfQuantizer)


def patch_modeling(module: ModuleType) -> None:
    """Let loading find ``quantize_config.json`` and weights under AutoGPTQ's names, and saving write the former.

    A packed model that is saved over an older checkpoint takes its place as a whole, and a float model that was made by
    a packed one's configuration is saved without its parameters.
    """
    replace_attribute(module.PreTrainedConfig, "get_config_dict", refuse_no_object)
    replace_attribute(module.PreTrainedConfig, "save_pretrained", _write_parameters)
    replace_attribute(module.PreTrainedModel, "save_pretrained", _replace_older)
    replace_attribute(module.PreTrainedModel, "from_pretrained", remember_source)
    replace_attribute(module.PeftAdapterMixin, "load_adapter", load_adapter_in_place)
    replace_attribute(module, "get_hf_quantizer", _read_configuration)
    replace_attribute(module, "_get_resolved_checkpoint_files", resolve_by(_find_files))
    patch_attention(module.AttentionInterface._global_mapping)
    if not hasattr(module.PreTrainedModel, "ep_plan"):  # before 5.19, a caller's plan replaces the model's
        mixin = next(base for base in module.PreTrainedModel.__mro__ if "maybe_distribute_model" in vars(base))
        replace_attribute(mixin, "maybe_distribute_model", keep_whole_in_stated)


def _read_configuration(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_hf_quantizer(config: Any, quantization_config: Any, *args: Any, **kwargs: Any) -> Any:
        loading = current()
        if loading is not None and kwargs.get("gguf_file") is None:
            quantization_config = loading.read_configuration(config, quantization_config)
        return original(config, quantization_config, *args, **kwargs)

    return get_hf_quantizer


def _find_files(
    loading: Loading, original: Callable[..., Files], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Files:
    pickle = loading.find_weights(kwargs)
    return ([pickle], None) if pickle else original(*args, **kwargs)


def _write_parameters(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        done = original(self, save_directory, *args, **kwargs)
        parameters = getattr(self, "quantization_config", None)
        if isinstance(parameters, GPTQConfig) and parameters.dataset is None:
            write_parameters(parameters.to_dict(), save_directory)
        return done

    return save_pretrained


def _replace_older(original: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        passed = signature.bind(self, save_directory, *args, **kwargs).arguments
        if _is_mislabeled(self):
            with without_label(self):
                return original(self, save_directory, *args, **kwargs)
        if (
            not isinstance(getattr(self, "hf_quantizer", None), GptqHfQuantizer)
            or getattr(self, "_hf_peft_config_loaded", False)  # writes the adapters alone
            or not passed.get("is_main_process", True)
            or passed.get("distributed_checkpoint")
            or os.path.isfile(save_directory)
        ):
            return original(self, save_directory, *args, **kwargs)
        folder = Path(save_directory)
        if passed.get("push_to_hub"):
            kwargs.setdefault("repo_id", folder.name)
        with replacing(folder) as staged:
            return original(self, staged, *args, **kwargs)

    return save_pretrained


def _is_mislabeled(model: Any) -> bool:
    """Whether a model's configuration says that it is packed, and nothing in it is, by graftq or by anything else."""
    quantizer = getattr(model, "hf_quantizer", None)
    holders = (model.config, model.config.get_text_config(decoder=True))
    parameters = next((found for each in holders if (found := getattr(each, "quantization_config", None))), None)
    stated = as_parameters(parameters) or {}
    method = stated.get("quant_method")
    if (getattr(method, "value", method) != "gptq" and not isinstance(parameters, GPTQConfig)) or getattr(
        parameters, "dataset", None
    ) is not None:
        return False
    if quantizer is not None and not isinstance(quantizer, GptqHfQuantizer):
        return False
    if is_packed(model, getattr(quantizer, "_origin", None)):
        return False
    return packed_name(list(model.state_dict())) is None
