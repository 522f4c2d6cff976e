"""The places of transformers 4 that graftq replaces, each by a thin function around the original."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from graftq.adapters.transformers import loading
from graftq.plugin.patching import replace_attribute, replace_item
from graftq.plugin.source import Source

FOUND_BY_TRANSFORMERS = ("model.safetensors", "model.safetensors.index.json")


def patch_quantizers(module: ModuleType) -> None:
    """Put graftq's quantiser and configuration class in the place of the stock ones for "gptq"."""
    from graftq.adapters.transformers.shared import GPTQConfig
    from graftq.adapters.transformers.v4.quantizer import replace_stock

    replace_item(module.AUTO_QUANTIZER_MAPPING, "gptq", replace_stock)
    replace_item(module.AUTO_QUANTIZATION_CONFIG_MAPPING, "gptq", lambda stock: GPTQConfig)


def patch_modeling(module: ModuleType) -> None:
    """Let ``from_pretrained`` see ``quantize_config.json``, and weight files under AutoGPTQ's names."""
    seams = ((module.PreTrainedModel, "from_pretrained", _read), (module, "_get_resolved_checkpoint_files", _resolve))
    if missing := [name for owner, name, _ in seams if name not in vars(owner)]:
        raise AttributeError(f"{module.__name__} has no {' and '.join(missing)}")  # rather none than some
    for owner, name, make in seams:
        replace_attribute(owner, name, make)


def _read(original: Any) -> Any:
    function = original.__func__

    @functools.wraps(function)
    def from_pretrained(cls: type, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        from transformers import PretrainedConfig

        with loading.begin(pretrained_model_name_or_path, kwargs):
            config = kwargs.get("config")
            # The auto classes hand one in; a model class called directly reads config.json alone.
            if isinstance(config, PretrainedConfig) and kwargs.get("gguf_file") is None:
                kwargs["config"] = config = copy.deepcopy(config)
                current = loading.current()
                assert current is not None  # this call's own
                current.read_configuration(config)
            return function(cls, pretrained_model_name_or_path, *args, **kwargs)

    return classmethod(from_pretrained)


def _resolve(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _get_resolved_checkpoint_files(*args: Any, **kwargs: Any) -> Any:
        current = loading.current()
        if current is None or current.source is None or kwargs.get("gguf_file") is not None:
            return original(*args, **kwargs)
        if current.config is None:
            files, metadata = original(*args, **kwargs)
            current.refuse_unlabelled(files, metadata)
            return files, metadata
        asked = dict(kwargs)
        pickle = current.find_weights(asked)
        name = asked.get("transformers_explicit_filename")
        if pickle:
            files, metadata = [pickle], None
        elif name in (None, kwargs.get("transformers_explicit_filename"), *FOUND_BY_TRANSFORMERS):
            files, metadata = original(*args, **kwargs)
        else:
            files, metadata = _fetch(current.source, name)
        current.open_index(files, metadata)
        return files, metadata

    return _get_resolved_checkpoint_files


def _fetch(source: Source, name: str) -> tuple[Sequence[str], Any]:
    """Files and the index's metadata, for names that no parameter of transformers 4.51 could tell it."""
    path = source.fetch(name)
    assert path is not None  # it has just been found
    if not name.endswith(".index.json"):
        return [path], None
    from transformers.utils.hub import get_checkpoint_shard_files

    return get_checkpoint_shard_files(source.name, path, **source.hub)
