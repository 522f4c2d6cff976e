"""Names taken from an engine when they are first asked for, since adapters register before its layers are imported."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any


def look_up(name: str, homes: Mapping[str, str], engine: str, known: str) -> Any:
    """What the engine keeps under a name.

    Args:
        name: Of a class, function or table.
        homes: The module in which the engine keeps each name.
        engine: The engine's name and version, for messages.
        known: The versions that graftq knows.

    Raises:
        AttributeError: if there is no such name in ``homes``.
        RuntimeError: if this version of the engine does not have it there.
    """
    if name not in homes:
        raise AttributeError(f"no home is known of {name!r}")
    try:
        return getattr(import_module(homes[name]), name)
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            f"{engine} has no {homes[name]}.{name} ({error}); graftq knows {engine.partition(' ')[0]} {known}"
        ) from error
