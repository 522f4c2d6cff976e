"""transformers: ``from_pretrained`` loads GPTQ checkpoints with graftq's layers.

Covered: transformers 5.16 and newer, and 4.51 to 4.57 by :mod:`graftq.adapters.transformers.v4`. This module is
imported when transformers is, and imports nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from graftq.plugin.hookspecs import hookimpl


@hookimpl
def graftq_seams(root: str) -> Mapping[str, Callable[[ModuleType], None]] | None:
    """Quantizers' configurations and registry, what resolves files, and ``generate``'s two; accelerate's writer."""
    from importlib.util import find_spec

    if root != "transformers" or find_spec(root) is None:
        return None
    found = _version()
    if not ((4, 51) <= found < (5, 0) or found >= (5, 16)):
        raise RuntimeError(f"transformers {'.'.join(map(str, found))}: graftq knows 4.51 to 4.57, and 5.16 and newer")
    seams = {"transformers.quantizers.auto": _patch_quantizers, "transformers.modeling_utils": _patch_modeling}
    if found >= (5, 16):
        from graftq.adapters.transformers.extra_parameters import patch_configuration

        # Comes early, also while modules of this package are half imported; none of them is needed for it.
        seams["transformers.utils.quantization_config"] = patch_configuration
        seams["accelerate.accelerator"] = _patch_accelerate
        seams["transformers.generation.utils"] = _patch_generation
        seams["transformers.generation.continuous_batching.continuous_api"] = _patch_continuous_batching
    return seams


def quantize(arguments: Any) -> int:
    """``graftq quantize``: run it, and return its exit status."""
    if _version() < (5, 16):
        raise RuntimeError("graftq quantize needs transformers 5.16 or newer")
    from graftq.adapters.transformers.making import command

    return command.run(arguments)


def _version() -> tuple[int, ...]:
    from importlib.metadata import version

    return tuple(int(part) for part in version("transformers").split(".")[:2])


def _patch_quantizers(module: ModuleType) -> None:
    _patches().patch_quantizers(module)


def _patch_modeling(module: ModuleType) -> None:
    _patches().patch_modeling(module)


def _patch_accelerate(module: ModuleType) -> None:
    from graftq.adapters.transformers.accelerate_saving import patch_accelerate

    patch_accelerate(module)


def _patch_generation(module: ModuleType) -> None:
    if hasattr(module, "DeferredStopCheck"):  # from 5.17 on
        from graftq.adapters.transformers.generation import patch_generation

        patch_generation(module)


def _patch_continuous_batching(module: ModuleType) -> None:
    from graftq.adapters.transformers.continuous_batching import patch_continuous_batching

    patch_continuous_batching(module)


def _patches() -> ModuleType:
    """The patches for this version; they import transformers' modules, and so not before there is one to patch."""
    if _version() < (5, 0):
        from graftq.adapters.transformers.v4 import patches as patches_v4

        return patches_v4
    from graftq.adapters.transformers import patches

    return patches
