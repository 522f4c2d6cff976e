"""text-generation-inference's Python server: ``--quantize gptq`` runs on graftq's layers, on GPUs and CPUs.

This module is imported when ``text_generation_server`` is, and imports nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType

from graftq.plugin.hookspecs import hookimpl

ROOT = "text_generation_server"
SEAMS = (
    "models.causal_lm",
    "utils.quantization",
    "layers.gptq",
    "layers.gptq.quantize",
    "layers.moe",
    "models.custom_modeling.flash_neox_modeling",
)


@hookimpl
def graftq_seams(root: str) -> Mapping[str, Callable[[ModuleType], None]] | None:
    """Where the server chooses a loader, loads weights, quantizes, runs experts, reorders heads, and falls back."""
    if root != ROOT:
        return None
    return {f"{ROOT}.{name}": _patch for name in SEAMS}


def _patch(module: ModuleType) -> None:
    from graftq.adapters.tgi import patches

    patches.PATCHES[module.__name__.removeprefix(f"{ROOT}.")](module)
