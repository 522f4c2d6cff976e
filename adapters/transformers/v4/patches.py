"""The places of transformers 4 that graftq replaces, each by a thin function around the original."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

from transformers.configuration_utils import PretrainedConfig

from graftq.adapters.transformers.loading import Files, Loading, current, remember_source, resolve_by
from graftq.adapters.transformers.registry import register
from graftq.adapters.transformers.v4.quantizer import GptqHfQuantizer
from graftq.plugin.checkpoint.source import Source
from graftq.plugin.patching import replace_attribute

FOUND_BY_TRANSFORMERS = ("model.safetensors", "model.safetensors.index.json")


def patch_quantizers(module: ModuleType) -> None:
    """Replace the stock quantizer and configuration class for "gptq" by graftq's."""
    register(module, GptqHfQuantizer)


def patch_modeling(module: ModuleType) -> None:
    """Let ``from_pretrained`` find ``quantize_config.json`` and weight files under AutoGPTQ's names."""
    replace_attribute(module.PreTrainedModel, "from_pretrained", _read_configuration)
    replace_attribute(module, "_get_resolved_checkpoint_files", resolve_by(_find_files))


def _read_configuration(original: Any) -> Any:
    function = original.__func__

    @functools.wraps(function)
    def from_pretrained(cls: type, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("config")
        # The auto classes pass one; a model class called directly reads config.json only.
        if isinstance(config, PretrainedConfig) and kwargs.get("gguf_file") is None:
            kwargs["config"] = config = copy.deepcopy(config)
            loading = current()
            assert loading is not None  # this call's own
            argument = loading.read_configuration(config, kwargs.get("quantization_config"))
            if argument is None:
                kwargs.pop("quantization_config", None)
        return function(cls, pretrained_model_name_or_path, *args, **kwargs)

    return remember_source(classmethod(from_pretrained))


def _find_files(
    loading: Loading, original: Callable[..., Files], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Files:
    asked = dict(kwargs)
    pickle = loading.find_weights(asked)
    if pickle:
        return [pickle], None
    name = asked.get("transformers_explicit_filename")
    if name in (None, kwargs.get("transformers_explicit_filename"), *FOUND_BY_TRANSFORMERS):
        return original(*args, **kwargs)
    assert loading.source is not None  # where it has just been found
    return _fetch(loading.source, name)


def _fetch(source: Source, name: str) -> Files:
    """The files of a name that transformers 4.51 has no parameter for."""
    path = source.fetch(name)
    assert path is not None  # it has just been found
    if not name.endswith(".index.json"):
        return [path], None
    from transformers.utils.hub import get_checkpoint_shard_files

    return get_checkpoint_shard_files(source.name, path, **source.hub)
