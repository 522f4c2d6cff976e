"""What stands in for the loader of a module that is to be patched, and how to look at a module without loading it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType, ModuleType
from typing import Any


class PatchingLoader:
    """A module's own loader, with another way to execute the module.

    Nothing is set on the own loader, which may serve other modules too, or pass what is set on to a third one.

    Args:
        loader: The module's own.
        execute: Gets the module and its own loader.
    """

    def __init__(self, loader: Any, execute: Callable[[ModuleType, Any], None]) -> None:
        self._loader = loader
        self._execute = execute

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_loader"), name)

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module, which shows its own loader from now on, for ``inspect``, ``importlib.resources``, ..."""
        own = attributes(module)
        own["__loader__"] = self._loader
        if own.get("__spec__") is not None:
            own["__spec__"].loader = self._loader
        self._execute(module, self._loader)


def attributes(module: object) -> dict[str, Any]:
    """What ``vars(module)`` gives, without the load that this sets off where the module is a lazy one."""
    try:
        found: dict[str, Any] = object.__getattribute__(module, "__dict__")
    except AttributeError:
        return {}
    return found


def is_lazy(module: object) -> bool:
    """Whether this is a module of :class:`importlib.util.LazyLoader` that has not been loaded yet."""
    return type(module) is getattr(sys.modules.get("importlib.util"), "_LazyModule", None)


def being_imported() -> set[str]:
    """Names of the modules that this thread is executing now, one importing the other."""
    names: set[str] = set()
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "<module>":
            names.add(frame.f_globals.get("__name__", ""))
        frame = frame.f_back
    return names
