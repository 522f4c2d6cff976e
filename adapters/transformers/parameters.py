"""Quantization parameters as callers hand them over: in a model's configuration, or beside it."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import Any

from graftq.plugin.checkpoint.configuration import CONFIG, QUANTIZE_CONFIG, read_written, stated_in
from graftq.plugin.checkpoint.source import HUB_ARGUMENTS, Source
from graftq.plugin.checkpoint.unlabeled import find_packed
from graftq.quant_linear.errors import CheckpointError


def declared_in(config: Any) -> tuple[Any, Mapping[str, Any] | None]:
    """The part of a model's configuration that has quantization parameters, or would have them, and these."""
    for holder in (config, config.get_text_config(decoder=True)):
        raw = getattr(holder, "quantization_config", None)
        if raw is not None:
            parameters = as_parameters(raw)
            if parameters is None:
                raise CheckpointError(f"quantization_config is a {type(raw).__name__}, not an object", file=CONFIG)
            return holder, parameters
    return config, None


def refuse_no_object(original: Any) -> Any:
    """For ``get_config_dict``, a class method: of a GPTQ checkpoint, refuse parameters that are no object.

    transformers asks it for its ``to_dict`` while it makes the configuration, which no other seam comes before.
    """
    function = original.__func__

    @functools.wraps(function)
    def get_config_dict(cls: type, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        found = function(cls, pretrained_model_name_or_path, **kwargs)
        stated = stated_in(found[0])
        if stated is not None and not isinstance(stated, Mapping):
            name = str(pretrained_model_name_or_path)
            hub = {key: kwargs[key] for key in HUB_ARGUMENTS if kwargs.get(key) is not None}
            source = Source(os.path.dirname(name) if os.path.isfile(name) else name, hub)
            if source.fetch(QUANTIZE_CONFIG) or (source.is_local and find_packed(source, allows_pickles=False)):
                read_written(source, stated)  # raises
        return found

    return classmethod(get_config_dict)


def as_parameters(given: Any) -> Mapping[str, Any] | None:
    """Parameters that a caller gives as an object or as a configuration of transformers' own; None if it is neither.

    transformers' ``GPTQConfig`` describes how to quantize. Of what it leaves at a default, nobody has said anything.
    """
    if isinstance(given, Mapping):
        return given
    if not hasattr(given, "to_dict"):
        return None
    parameters = given.to_dict()
    if type(given).__module__.startswith("transformers.") and type(given).__name__ == "GPTQConfig":
        stated = {key: parameters[key] for key in ("quant_method", "bits", "group_size", "checkpoint_format")}
        stated |= {key: True for key in ("desc_act",) if parameters[key]}
        return stated | {key: False for key in ("sym",) if not parameters[key]}
    return parameters
