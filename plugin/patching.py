"""Replacing attributes of other packages' modules so that it shows, happens once or not at all, and can be undone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, MutableSequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple


class Replaced(NamedTuple):
    """One replacement: the object that holds it, under which name, and how to put the original back."""

    owner: Any
    name: str
    put_back: Callable[[], None]


Undo = list[Replaced]

_undo: Undo = []
"""How to put back everything that is replaced now."""
_open: ContextVar[Undo] = ContextVar("graftq_undo", default=_undo)
"""Where a replacement is noted: the innermost :func:`all_or_none`'s own list, until that has ended well."""


def replace_attribute(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Set ``owner.name`` to ``make(original)``, unless graftq has done so before.

    Raises:
        AttributeError: if the module or class has no such attribute of its own.
    """
    if name not in vars(owner):
        raise AttributeError(f"{owner.__name__} has no {name}")
    original = vars(owner)[name]
    if _is_ours(original):
        return
    replacement = _mark(make(original))
    _note(owner, name, lambda: setattr(owner, name, original))  # first, as Ctrl-C may come between the two
    setattr(owner, name, replacement)


def replace_item(mapping: MutableMapping[str, Any], key: str, make: Callable[[Any], Any]) -> None:
    """Set ``mapping[key]`` to ``make(original)``, unless graftq has done so before."""
    original = mapping[key]
    if _is_ours(original):
        return
    replacement = _mark(make(original))
    _note(mapping, key, lambda: mapping.__setitem__(key, original))
    mapping[key] = replacement


def add_attribute(owner: Any, name: str, value: Any) -> None:
    """Set ``owner.name`` to ``value``, unless there is such an attribute."""
    if name not in vars(owner):
        setattr(owner, name, value)
        _note(owner, name, lambda: delattr(owner, name))


def append(sequence: MutableSequence[Any], item: Any) -> None:
    """Append ``item`` to a sequence that others use too, unless it is there."""
    if item not in sequence:
        sequence.append(item)
        _open.get().append(Replaced(sequence, repr(item), lambda: sequence.remove(item)))


@contextmanager
def all_or_none() -> Iterator[None]:
    """Put back what was replaced meanwhile if this ends in an exception: half a patch is worse than none.

    An import meanwhile may run other patches, which have an ``all_or_none`` of their own, and stay.
    """
    mine: Undo = []
    token = _open.set(mine)
    try:
        yield
    except BaseException:
        _put_back(mine)
        raise
    finally:
        _open.reset(token)
    _undo.extend(mine)


def undo_all() -> None:
    """Put every original back."""
    _put_back(_undo)


def _put_back(undo: Undo, down_to: int = 0) -> None:
    """Last replaced first, until ``down_to`` replacements are left."""
    while len(undo) > down_to:
        undo.pop().put_back()


def _note(owner: Any, name: str, put_back: Callable[[], None]) -> None:
    # Where an original stands again, its owner has been reloaded, and the older original is obsolete.
    _undo[:] = [known for known in _undo if known.owner is not owner or known.name != name]
    _open.get().append(Replaced(owner, name, put_back))


def _mark(replacement: Any) -> Any:
    target = getattr(replacement, "__func__", replacement)
    target._graftq = True
    return replacement


def _is_ours(value: Any) -> bool:
    # `vars`, not `getattr`: a subclass of our class is not ours
    return "_graftq" in vars(getattr(value, "__func__", value))
