"""The six places of transformers that graftq replaces, each by a thin function around the original."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

from graftq.adapters.transformers import loading
from graftq.plugin.patching import replace_attribute, replace_item


def patch_quantizers(module: ModuleType) -> None:
    """Put graftq's quantiser and configuration class in the place of the stock ones for "gptq"."""
    from graftq.adapters.transformers.quantizer import replace_stock
    from graftq.adapters.transformers.shared import GPTQConfig

    replace_item(module.AUTO_QUANTIZER_MAPPING, "gptq", replace_stock)
    replace_item(module.AUTO_QUANTIZATION_CONFIG_MAPPING, "gptq", lambda stock: GPTQConfig)


def patch_modeling(module: ModuleType) -> None:
    """Let loading see ``quantize_config.json``, and weights under AutoGPTQ's names; let saving write the former."""
    seams = (
        (module.PreTrainedConfig, "save_pretrained", _write_parameters),
        (module.PreTrainedModel, "from_pretrained", _remember_source),
        (module, "get_hf_quantizer", _read_configuration),
        (module, "_get_resolved_checkpoint_files", _resolve_files),
    )
    if missing := [name for owner, name, _ in seams if name not in vars(owner)]:
        raise AttributeError(f"{module.__name__} has no {' and '.join(missing)} any more")  # rather none than some
    for owner, name, make in seams:
        replace_attribute(owner, name, make)


def _remember_source(original: Any) -> Any:
    function = original.__func__

    # None of the inner functions gets told where the checkpoint comes from.
    @functools.wraps(function)
    def from_pretrained(cls: type, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        with loading.begin(pretrained_model_name_or_path, kwargs):
            return function(cls, pretrained_model_name_or_path, *args, **kwargs)

    return classmethod(from_pretrained)


def _read_configuration(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_hf_quantizer(config: Any, quantization_config: Any, *args: Any, **kwargs: Any) -> Any:
        current = loading.current()
        if current is not None and kwargs.get("gguf_file") is None:
            current.read_configuration(config)
        return original(config, quantization_config, *args, **kwargs)

    return get_hf_quantizer


def _resolve_files(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _get_resolved_checkpoint_files(*args: Any, **kwargs: Any) -> Any:
        current = loading.current()
        if current is None or current.source is None or kwargs.get("gguf_file") is not None:
            return original(*args, **kwargs)
        if current.config is None:
            files, metadata = original(*args, **kwargs)
            current.refuse_unlabelled(files, metadata)
            return files, metadata
        pickle = current.find_weights(kwargs)
        files, metadata = ([pickle], None) if pickle else original(*args, **kwargs)
        current.open_index(files, metadata)
        return files, metadata

    return _get_resolved_checkpoint_files


def _write_parameters(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        from graftq.adapters.transformers.saving import write_parameters
        from graftq.adapters.transformers.shared import GPTQConfig

        done = original(self, save_directory, *args, **kwargs)
        parameters = getattr(self, "quantization_config", None)
        if isinstance(parameters, GPTQConfig) and parameters.dataset is None:
            write_parameters(parameters.to_dict(), save_directory)
        return done

    return save_pretrained
