"""Modules that stand in for an engine's, while graftq's adapter for it is imported anew."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any


@contextmanager
def stand_in(contents: Mapping[str, Mapping[str, Any]], engine: str) -> Iterator[None]:
    """Make ``import`` of the engine find these modules, each after its parent, and forget them again."""
    ours = (engine, f"graftq.adapters.{engine}")
    before = {name: module for name, module in sys.modules.items() if _below(name, ours)}
    for name in before:
        del sys.modules[name]
    for name, content in contents.items():
        module = ModuleType(name)
        vars(module).update(content)
        module.__path__ = []
        sys.modules[name] = module
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, module)
    try:
        yield
    finally:
        for name in [name for name in sys.modules if _below(name, ours)]:
            del sys.modules[name]
        sys.modules.update(before)


def these(*found: Any) -> dict[str, Any]:
    """Classes and functions by their names."""
    return {one.__name__: one for one in found}


def _below(name: str, roots: tuple[str, ...]) -> bool:
    return any(name == root or name.startswith(f"{root}.") for root in roots)
