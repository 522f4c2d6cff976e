"""The places of ``optimum.gptq`` that graftq replaces."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

from graftq.plugin.patching import add_attribute, replace_attribute


def patch_making(module: ModuleType) -> None:
    """Let ``GPTQQuantizer`` quantize with graftq, unless it names a backend of GPTQModel's."""
    quantizer = module.GPTQQuantizer
    replace_attribute(quantizer, "__init__", _keep_arguments)
    replace_attribute(quantizer, "quantize_model", _quantize_model)
    replace_attribute(quantizer, "save", _save)


def patch_quantizer(module: ModuleType) -> None:
    """Let ``GPTQQuantizer`` exist without GPTQModel, quantize with graftq, and load with graftq's layers."""
    from graftq.adapters.optimum.convert import convert_model, post_init_model

    patch_making(module)
    quantizer = module.GPTQQuantizer
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


def _keep_arguments(original: Callable[..., None]) -> Callable[..., None]:
    known = inspect.signature(original).parameters.values()
    positional = [each.name for each in known if each.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        """The stock one drops what it does not know; ``checkpoint_format`` is ``quantize_config.json``'s ``format``."""
        named = kwargs.pop("checkpoint_format", None)
        original(self, *args, **({"format": named, **kwargs} if named else kwargs))
        self.graftq_extra = {key: value for key, value in kwargs.items() if key not in positional}
        if more := args[len(positional) - 1 :]:
            self.graftq_extra[f"at position {len(positional)}"] = more[0]

    return __init__


def _quantize_model(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def quantize_model(self: Any, model: Any, tokenizer: Any = None) -> Any:
        from graftq.adapters.optimum import making

        if making.quantizes(self):
            return making.quantize_model(self, model, tokenizer)
        return original(self, model, tokenizer)

    return quantize_model


def _save(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def save(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        from graftq.adapters.optimum import making

        if making.is_packed_by_graftq(model):
            return making.save(model, *args, **kwargs)
        return original(self, model, *args, **kwargs)

    return save


def _load_quantized_model(original: Callable[..., Any]) -> Callable[..., Any]:
    from graftq.adapters.optimum.load import load_quantized_model

    return functools.wraps(original)(load_quantized_model)
