"""``generate_batch`` and ``transformers serve``: says once what makes them several times as fast for a packed model."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

from graftq.adapters.transformers.generation import is_loaded_packed
from graftq.plugin.patching import replace_attribute

logger = logging.getLogger("graftq")

_said: set[str] = set()


def patch_continuous_batching(module: ModuleType) -> None:
    """Look at the settings that a packed model's continuous batching starts with."""
    replace_attribute(module.ContinuousMixin, "init_continuous_batching", _look_at_settings)


def _look_at_settings(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def init_continuous_batching(
        self: Any, generation_config: Any = None, continuous_batching_config: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        attention = str(self.config._attn_implementation)
        if (
            is_loaded_packed(self)
            and self.device.type == "cuda"
            and getattr(continuous_batching_config, "use_cuda_graph", None) is None
            and "flash" not in attention
            and attention not in _said
        ):
            _said.add(attention)
            logger.info(
                "graftq: with %s attention, transformers runs continuous batching without CUDA graphs, and waits for "
                "the host at every step; ContinuousBatchingConfig(use_cuda_graph=True) does not (docs/generating.md)",
                attention,
            )
        return original(self, generation_config, continuous_batching_config, *args, **kwargs)

    return init_continuous_batching
