"""PEFT: adapters on packed layers, and LoRA on the packed experts of a mixture.

Covered: PEFT 0.21. This module is imported when PEFT is, and imports nothing of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from types import ModuleType

from graftq.plugin.hookspecs import hookimpl

logger = logging.getLogger("graftq")

OLDEST = (0, 21)


@hookimpl
def graftq_seams(root: str) -> Mapping[str, Callable[[ModuleType], None]] | None:
    """LoRA's configuration, which accepts layers of other packages, and what finds layers to adapt or to train."""
    from importlib.metadata import version
    from importlib.util import find_spec

    if root != "peft" or find_spec(root) is None:
        return None
    found = version("peft")
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST:
        # No warning: text-generation-inference imports the old version that it pins, even if it serves no adapters.
        logger.info("graftq knows PEFT from 0.21 on, and this is %s, which finds no packed layer to adapt", found)
        return None
    return {
        "peft.utils.other": _by("patch_wrappers"),
        "peft.peft_model": _by("patch_peft_model"),
        "peft.tuners.tuners_utils": _by("patch_tuners"),
        "peft.tuners.lora.config": _by("patch_config"),
        "peft.tuners.lora.model": _by("patch_model"),
        "peft.tuners.adaption_prompt.layer": _by("patch_adaption_prompt"),
    }


def _by(name: str) -> Callable[[ModuleType], None]:
    """A patch of :mod:`graftq.adapters.peft.patches`, which imports what is there only once it is called for."""

    def patch(module: ModuleType) -> None:
        from graftq.adapters.peft import patches

        getattr(patches, name)(module)

    return patch
