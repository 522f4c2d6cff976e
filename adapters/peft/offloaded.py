"""Adapters on a packed model that is partly offloaded: they stay in memory, and the model stays where it is.

PEFT itself dispatches such a model anew when an adapter is loaded, by a copy of its weight files under the names of the
adapted layers, and puts adapters of offloaded layers on the meta device, where they have no values.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from graftq.quant_linear.offloaded import keeping_places, lends
from graftq.quant_linear.packed_module import PackedModule


def keep_places(original: Any) -> Any:
    """For ``PeftModel.from_pretrained``, a class method: hide from it that parts of a packed model are offloaded."""
    function = original.__func__

    @functools.wraps(function)
    def from_pretrained(cls: type, model: Any, *args: Any, **kwargs: Any) -> Any:
        with keeping_places(model):
            return function(cls, model, *args, **kwargs)

    return classmethod(from_pretrained)


def keep_places_of_loaded(original: Callable[..., Any]) -> Callable[..., Any]:
    """For ``PeftModel.load_adapter``: likewise."""

    @functools.wraps(original)
    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        with keeping_places(self):
            return original(self, *args, **kwargs)

    return load_adapter


def refuse_lost(original: Callable[..., Any]) -> Callable[..., Any]:
    """For ``BaseTuner.inject_adapter``: raise if an adapter in a packed model got no values.

    Raises:
        ValueError: naming the layer, which is plain and offloaded, or by the hook of a module around it.
    """

    @functools.wraps(original)
    def inject_adapter(self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        added = original(self, model, adapter_name, *args, **kwargs)
        is_packed = any(isinstance(module, PackedModule) for module in model.modules())
        for name, layer in model.named_modules() if is_packed else ():
            names = (*getattr(layer, "adapter_layer_names", ()), *getattr(layer, "other_param_names", ()))
            if not any(adapter_name in (getattr(layer, own, None) or ()) for own in names):
                continue
            is_copied = "original_module" in layer._modules  # by `modules_to_save`
            base: Any = layer.original_module if is_copied else layer.get_base_layer()
            if any(tensor.is_meta for tensor in (*base.parameters(), *base.buffers())) and not (
                isinstance(base, PackedModule) and lends(base)
            ):
                raise ValueError(
                    f"{name} is offloaded, and PEFT leaves its adapter without values: only packed layers with a hook "
                    "of their own take one; keep this layer in memory, or leave it out of target_modules"
                )
        return added

    return inject_adapter
