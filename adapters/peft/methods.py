"""PEFT's methods besides LoRA: their own layers around packed ones, where that is right, and refused by name elsewhere.

Most of these methods add to a linear layer's output, or change its input, and so do not mind how its weight is stored;
others multiply by ``weight``, which a packed layer dequantizes at each access. Their code asks for a
``torch.nn.Linear`` nevertheless, so that is what packed layers are while adapters are put around them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from graftq.plugin.patching import replace_attribute
from graftq.quant_linear.experts import QuantExperts
from graftq.quant_linear.linear import QuantLinear

OWN = "LORA"
"""The method with layers of graftq's own (:mod:`graftq.adapters.peft.lora`)."""

# fmt: off
WORKS = (
    "ADALORA", "BEFT", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "FROD", "GRALORA", "HIRA", "HRA", "IA3", "LILY",
    "LOHA", "LOKR", "MISS", "OFT", "OSF", "PEANUT", "PSOFT", "PVERA", "RANDLORA", "ROAD", "SHIRA", "SUPERTUNING",
    "TINYLORA", "UNILORA", "VBLORA", "VERA", "WAVEFT",
)
# fmt: on
"""Methods whose layers compute the same, and learn the same, around packed layers as around float ones."""


class AsLinear(QuantLinear, nn.Linear):  # type: ignore[override] # its weight is a property
    """What a packed layer is while PEFT looks for layers and puts adapters around them."""


def look_at_linear(original: Callable[..., None]) -> Callable[..., None]:
    """For ``BaseTuner.__init__``: some methods look at all layers before they put adapters around any."""

    @functools.wraps(original)
    def __init__(self: Any, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = peft_config.get(adapter_name) if isinstance(peft_config, dict) else peft_config
        with _as_linear(model, _method(config)):
            original(self, model, peft_config, adapter_name, *args, **kwargs)

    return __init__


def put_around(original: Callable[..., Any]) -> Callable[..., Any]:
    """For ``BaseTuner.inject_adapter``: let methods other than LoRA find packed layers, if they are right on them."""

    @functools.wraps(original)
    def inject_adapter(self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        create = self._create_and_replace

        def checked(config: Any, name: str, target: Any, own: str, parent: nn.Module, **named: Any) -> None:
            base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
            _check_method(_method(config), named.get("current_key", own), base)
            create(config, name, target, own, parent, **named)
            if isinstance(base, QuantLinear):
                _guard_merging(type(getattr(parent, own)))

        method = _method(self.peft_config[adapter_name])
        if method == OWN or not any(isinstance(module, QuantLinear) for module in model.modules()):
            return original(self, model, adapter_name, *args, **kwargs)
        vars(self)["_create_and_replace"] = checked
        try:
            with _as_linear(model, method):
                return original(self, model, adapter_name, *args, **kwargs)
        finally:
            del vars(self)["_create_and_replace"]

    return inject_adapter


def check_merge(base: nn.Module) -> None:
    """Raise if an adapter is to be added to packed weights: what it would be added to is a temporary float weight.

    Raises:
        ValueError: always then.
    """
    if isinstance(base, (QuantLinear, QuantExperts)):
        raise ValueError(
            "an adapter cannot be merged into packed weights; call dequantize() on the base model, then merge"
        )


def refuse_training(original: Callable[..., None]) -> Callable[..., None]:
    """For PEFT's wrapper of modules that are trained as a whole (``modules_to_save``): none of them is packed."""

    @functools.wraps(original)
    def __init__(self: Any, module_to_save: nn.Module, *args: Any, **kwargs: Any) -> None:
        packed = next((m for m in module_to_save.modules() if isinstance(m, (QuantLinear, QuantExperts))), None)
        if packed is not None:
            raise ValueError(
                f"modules_to_save names {type(packed).__name__}({packed.extra_repr()}) or a module that holds it, and "
                "packed weights cannot be trained; put an adapter on it (target_modules), or dequantize() the model"
            )
        original(self, module_to_save, *args, **kwargs)

    return __init__


def _method(config: Any) -> str:
    method = getattr(config, "peft_type", None)
    return str(getattr(method, "value", method))


@contextmanager
def _as_linear(model: nn.Module, method: str) -> Iterator[None]:
    """Let packed layers be instances of ``torch.nn.Linear`` as long as this lasts, if ``method`` is right on them."""
    layers = [module for module in model.modules() if type(module) is QuantLinear] if method in WORKS else []
    for layer in layers:
        layer.__class__ = AsLinear
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = QuantLinear


def _guard_merging(kind: type) -> None:
    """Have a class of adapted layers refuse to merge into packed weights."""
    owner = next((each for each in kind.__mro__ if "merge" in vars(each)), None)
    if owner is not None:
        replace_attribute(owner, "merge", _merge_into_float)


def _merge_into_float(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def merge(self: Any, *args: Any, **kwargs: Any) -> None:
        check_merge(self.get_base_layer())
        original(self, *args, **kwargs)

    return merge


def _check_method(method: str, name: str, base: nn.Module) -> None:
    """Raise if ``base`` is packed, and not known to be right under adapters of ``method``."""
    if method == OWN or not isinstance(base, (QuantLinear, QuantExperts)):
        return
    if method in WORKS and isinstance(base, QuantLinear):
        return
    what, known = ("experts", (OWN,)) if isinstance(base, QuantExperts) else ("layers", (OWN, *WORKS))
    raise ValueError(
        f"{name}: {method} is not known to be right on packed {what}; these are: {', '.join(known)}. "
        "dequantize() the model before other adapters are put on it"
    )
