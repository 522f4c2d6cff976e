"""An adapter: names the module to patch, and patches it once it is there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType

from graftq.plugin.hookspecs import hookimpl
from graftq.plugin.patching import replace_attribute


@hookimpl
def graftq_seams(root: str) -> Mapping[str, Callable[[ModuleType], None]] | None:
    return {"toyframework.engine": patch_engine} if root == "toyframework" else None


def patch_engine(module: ModuleType) -> None:
    replace_attribute(module, "load", lambda original: lambda name: f"graftq's {original(name)}")
