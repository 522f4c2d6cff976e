"""Replacing attributes of other people's modules so that it shows, happens once, and can be undone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, MutableSequence
from contextlib import contextmanager
from typing import Any

_undo: list[Callable[[], None]] = []


def replace_attribute(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Set ``owner.name`` to ``make(original)``, unless graftq has done so before."""
    original = vars(owner)[name]
    if _is_ours(original):
        return
    setattr(owner, name, _mark(make(original)))
    _undo.append(lambda: setattr(owner, name, original))


def replace_item(mapping: MutableMapping[str, Any], key: str, make: Callable[[Any], Any]) -> None:
    """Set ``mapping[key]`` to ``make(original)``, unless graftq has done so before."""
    original = mapping[key]
    if _is_ours(original):
        return
    mapping[key] = _mark(make(original))
    _undo.append(lambda: mapping.__setitem__(key, original))


def add_attribute(owner: Any, name: str, value: Any) -> None:
    """Set ``owner.name`` to ``value``, unless there is such an attribute."""
    if name not in vars(owner):
        setattr(owner, name, value)
        _undo.append(lambda: delattr(owner, name))


def append(sequence: MutableSequence[Any], item: Any) -> None:
    """Append ``item`` to a sequence that others use too, unless it is there."""
    if item not in sequence:
        sequence.append(item)
        _undo.append(lambda: sequence.remove(item))


def undo_all(down_to: int = 0) -> None:
    """Put originals back, last replaced first, until ``down_to`` replacements are left."""
    while len(_undo) > down_to:
        _undo.pop()()


@contextmanager
def undoing() -> Iterator[None]:
    """At the end, put back what was replaced meanwhile."""
    before = len(_undo)
    try:
        yield
    finally:
        undo_all(before)


def _mark(replacement: Any) -> Any:
    target = getattr(replacement, "__func__", replacement)
    target._graftq = True
    return replacement


def _is_ours(value: Any) -> bool:
    # `vars`, not `getattr`: a subclass of our class is not ours
    return "_graftq" in vars(getattr(value, "__func__", value))
