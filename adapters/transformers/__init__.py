"""transformers: ``from_pretrained`` loads GPTQ checkpoints with graftq's layers.

Covered: transformers 5.16 and newer, and 4.51 to 4.57 by :mod:`graftq.adapters.transformers.v4`. This module is
imported when transformers is, and imports nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType

from graftq.plugin.hookspecs import hookimpl

OLDEST = (5, 16)


@hookimpl
def graftq_seams(root: str) -> Mapping[str, Callable[[ModuleType], None]] | None:
    """The registry of quantisers, and the module that resolves files and calls the quantiser."""
    if root != "transformers":
        return None
    from importlib.metadata import version

    from graftq.adapters.transformers import v4

    found = version("transformers")
    release = tuple(int(part) for part in found.split(".")[:2])
    if v4.OLDEST <= release < (5, 0):
        return v4.seams()
    if release < OLDEST:
        raise RuntimeError(f"transformers {found}: graftq knows 4.51 to 4.57, and 5.16 and newer")
    return {
        "transformers.quantizers.auto": _patch_quantizers,
        "transformers.modeling_utils": _patch_modeling,
    }


def _patch_quantizers(module: ModuleType) -> None:
    from graftq.adapters.transformers import seams

    seams.patch_quantizers(module)


def _patch_modeling(module: ModuleType) -> None:
    from graftq.adapters.transformers import seams

    seams.patch_modeling(module)
