"""``import auto_gptq`` where AutoGPTQ is not installed and the user has asked for graftq in its place."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from graftq.plugin import patching, switches

logger = logging.getLogger("graftq")

_HERE = "graftq.adapters.auto_gptq"
MODULES = {
    "auto_gptq": _HERE,
    "auto_gptq.modeling": f"{_HERE}.modeling",
    "auto_gptq.modeling._base": f"{_HERE}.modeling",
    "auto_gptq.modeling._utils": f"{_HERE}.modeling",
    "auto_gptq.modeling.auto": f"{_HERE}.modeling",
    "auto_gptq.quantization": f"{_HERE}.quantize_config",
    "auto_gptq.quantization.config": f"{_HERE}.quantize_config",
    "auto_gptq.utils": f"{_HERE}.utils",
    "auto_gptq.utils.exllama_utils": f"{_HERE}.utils",
    "auto_gptq.utils.peft_utils": f"{_HERE}.utils",
}
"""Modules that programs import from, and the modules of this package that replace them."""


class StandIn(Loader):
    """Finder and loader in one. It is the last on ``sys.meta_path``, so an installed AutoGPTQ is found first.

    Attributes:
        asked: Whether :func:`ask` was called.
    """

    def __init__(self) -> None:
        self.asked = False

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """A spec for a module of ``auto_gptq``, if the user has asked for the stand-in."""
        if name not in MODULES or switches.disabled() or not (self.asked or switches.is_on(switches.AUTO_GPTQ)):
            return None
        is_package = any(other.startswith(f"{name}.") for other in MODULES)
        return ModuleSpec(name, self, origin=MODULES[name], is_package=is_package)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """A module that forwards to another one."""
        return _Alias(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Import the module that it forwards to."""
        import_module(MODULES[module.__name__])
        if module.__name__ == "auto_gptq":
            logger.info(
                "graftq stands in for auto_gptq, which is not installed, as %s asks; %s=1 switches it off",
                "install()" if self.asked else f"{switches.AUTO_GPTQ}=1",
                switches.DISABLE,
            )


class _Alias(ModuleType):
    """Reads and writes the attributes of the module that it forwards to.

    Writes too, because programs replace ``AutoModelForCausalLM`` by classes of their own (KoboldAI does).
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in ("__all__", "__version__"):  # `__path__` and similar ones are its own
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        child = f"{self.__name__}.{name}"
        return import_module(child) if child in MODULES else getattr(sys.modules[MODULES[self.__name__]], name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("__") or isinstance(value, ModuleType):  # set by the import system
            super().__setattr__(name, value)
        else:
            setattr(sys.modules[MODULES[self.__name__]], name, value)


_stand_in = StandIn()


def place() -> None:
    """Put the finder after all others; it finds nothing until the user asks for it."""
    patching.append(sys.meta_path, _stand_in)


def ask() -> None:
    """What :func:`graftq.adapters.auto_gptq.install` does."""
    place()
    _stand_in.asked = True
    spec = find_spec("auto_gptq")
    if spec is None or spec.loader is not _stand_in:
        why = f"{switches.DISABLE} is set" if spec is None else f"it is installed ({spec.origin})"
        logger.warning("graftq does not stand in for auto_gptq: %s", why)
