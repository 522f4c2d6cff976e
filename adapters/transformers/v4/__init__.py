"""transformers 4, which text-generation-inference pins: per-expert ``nn.Linear``, names as the checkpoint has them.

Covered: transformers 4.51 to 4.57. Called by :mod:`graftq.adapters.transformers` for what is older than 5.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType

OLDEST = (4, 51)


def seams() -> Mapping[str, Callable[[ModuleType], None]]:
    """The modules to patch."""
    return {
        "transformers.quantizers.auto": _patch_quantizers,
        "transformers.modeling_utils": _patch_modeling,
    }


def _patch_quantizers(module: ModuleType) -> None:
    from graftq.adapters.transformers.v4 import patches

    patches.patch_quantizers(module)


def _patch_modeling(module: ModuleType) -> None:
    from graftq.adapters.transformers.v4 import patches

    patches.patch_modeling(module)
