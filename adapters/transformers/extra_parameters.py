"""What ``GPTQConfig`` of transformers has no place for, and graftq's quantizer a meaning."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

from graftq.plugin.patching import replace_attribute

EXTRA = ("static_groups", "lm_head", "effort")


def patch_configuration(module: ModuleType) -> None:
    """Let ``GPTQConfig`` keep these keyword arguments, which the stock one takes and drops."""
    replace_attribute(module.GPTQConfig, "__init__", _keep_extra)


def _keep_extra(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        vars(self).update({name: kwargs[name] for name in EXTRA if kwargs.get(name) is not None})

    return __init__
