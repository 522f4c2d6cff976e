"""Replacing what belongs to others: once, all or nothing, and back."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
from support.undoing import undoing

from graftq.plugin import patching


def ours(stock: Any) -> Any:
    return lambda: f"graftq's {stock()}"


def broken(stock: Any) -> Any:
    raise ImportError("a name that has moved")


@pytest.fixture
def host() -> Iterator[Any]:
    """A framework's module; whatever a test replaces in it is put back."""
    module: Any = ModuleType("host")
    module.load, module.save = lambda: "load", lambda: "save"
    module.registry = {"gptq": lambda: "registered"}
    module.finders = ["stock"]
    with undoing():
        yield module


def replace_everything(host: Any) -> None:
    patching.replace_attribute(host, "load", ours)
    patching.replace_item(host.registry, "gptq", ours)
    patching.add_attribute(host, "added", "graftq's")
    patching.append(host.finders, "graftq's")


def state(host: Any) -> tuple[Any, ...]:
    return host.load(), host.registry["gptq"](), getattr(host, "added", None), host.finders


STOCK = ("load", "registered", None, ["stock"])
OURS = ("graftq's load", "graftq's registered", "graftq's", ["stock", "graftq's"])


def test_once_and_back(host: Any) -> None:
    with undoing():
        replace_everything(host)
        replace_everything(host)
        assert state(host) == OURS
    assert state(host) == STOCK


def fail(host: Any, place: str) -> None:
    with patching.all_or_none():
        replace_everything(host)
        patching.replace_attribute(host, place, broken)


def test_all_or_none(host: Any) -> None:
    with pytest.raises(ImportError, match="has moved"):
        fail(host, "save")
    assert (*state(host), host.save()) == (*STOCK, "save")
    with patching.all_or_none():
        replace_everything(host)
    assert state(host) == OURS


def test_what_is_missing_is_named(host: Any) -> None:
    with pytest.raises(AttributeError, match="host has no laod"):
        fail(host, "laod")
    assert state(host) == STOCK


def test_patches_that_ran_meanwhile_stay(host: Any) -> None:
    """As when a patch imports another framework, and fails after that."""

    def importing(stock: Any) -> Any:
        with patching.all_or_none():
            replace_everything(host)
        return broken(stock)

    def patch() -> None:
        with patching.all_or_none():
            patching.add_attribute(host, "another", "graftq's")
            patching.replace_attribute(host, "save", importing)

    with pytest.raises(ImportError):
        patch()
    assert (*state(host), host.save(), hasattr(host, "another")) == (*OURS, "save", False)
