"""The places of ``optimum.gptq`` that graftq replaces."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

from graftq.plugin.patching import add_attribute, replace_attribute


def patch_quantizer(module: ModuleType) -> None:
    """Let ``GPTQQuantizer`` exist without GPTQModel, and load with graftq's layers."""
    from graftq.adapters.optimum.convert import convert_model, post_init_model

    quantizer = module.GPTQQuantizer
    replace_attribute(quantizer, "__init__", _keep_format)
    replace_attribute(quantizer, "convert_model", lambda stock: functools.wraps(stock)(convert_model))
    replace_attribute(quantizer, "post_init_model", lambda stock: functools.wraps(stock)(post_init_model))
    replace_attribute(module, "load_quantized_model", _load_quantized_model)
    # Stand in for GPTQModel's classes, which `__init__` needs for quantizing only.
    add_attribute(module, "QuantizeConfig", SimpleNamespace)
    add_attribute(module, "FORMAT", str)
    add_attribute(module, "METHOD", str)


def patch_package(module: ModuleType) -> None:
    """The same function in the package that imported it by name, in case that was before the patch."""
    replace_attribute(module, "load_quantized_model", _load_quantized_model)


def _keep_format(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        """The stock one drops ``checkpoint_format``, which is what ``quantize_config.json`` calls ``format``."""
        named = kwargs.pop("checkpoint_format", None)
        original(self, *args, **({"format": named, **kwargs} if named else kwargs))

    return __init__


def _load_quantized_model(original: Callable[..., Any]) -> Callable[..., Any]:
    from graftq.adapters.optimum.load import load_quantized_model

    return functools.wraps(original)(load_quantized_model)
