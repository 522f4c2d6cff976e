"""optimum: its GPTQ functions quantize with graftq, and load with its layers where GPTQModel is not installed.

Covered: optimum 2. This module is imported when optimum is, and imports nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType

from graftq.plugin.hookspecs import hookimpl


@hookimpl
def graftq_seams(root: str) -> Mapping[str, Callable[[ModuleType], None]] | None:
    """The module of the functions, and the package that hands on one of them."""
    if root != "optimum":
        return None
    from importlib.util import find_spec

    if find_spec("gptqmodel") is not None:  # which loads what it supports
        return {"optimum.gptq.quantizer": _patch_making}
    return {"optimum.gptq.quantizer": _patch_quantizer, "optimum.gptq": _patch_package}


def _patch_quantizer(module: ModuleType) -> None:
    from graftq.adapters.optimum import patches

    patches.patch_quantizer(module)


def _patch_making(module: ModuleType) -> None:
    from graftq.adapters.optimum import patches

    patches.patch_making(module)


def _patch_package(module: ModuleType) -> None:
    from graftq.adapters.optimum import patches

    patches.patch_package(module)
