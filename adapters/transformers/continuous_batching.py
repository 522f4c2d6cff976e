"""``generate_batch`` and ``transformers serve`` with packed models: attention without masks, a line about settings."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

from graftq.adapters.transformers import paged_attention
from graftq.adapters.transformers.generation import is_loaded_packed
from graftq.plugin.patching import replace_attribute

logger = logging.getLogger("graftq")

_said: set[str] = set()


def patch_continuous_batching(module: ModuleType) -> None:
    """Choose the attention of a packed model's continuous batching, and look at the settings it starts with."""
    replace_attribute(module.ContinuousBatchingManager, "switch_to_cb_friendly_attn", _switch_attention)
    replace_attribute(module.ContinuousMixin, "init_continuous_batching", _look_at_settings)


def _switch_attention(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def switch_to_cb_friendly_attn(self: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        given = model.config._attn_implementation
        original(self, model, *args, **kwargs)
        is_asked_for_flash = all([*args, kwargs.get("auto_switch_to_flash", True)])
        chosen = str(model.config._attn_implementation)
        if given != "sdpa" or not chosen.endswith("sdpa") or not is_asked_for_flash or not _can_switch(model):
            return
        paged_attention.register()
        name = f"{'paged|' if chosen.startswith('paged|') else ''}{paged_attention.NAME}"
        model.config.get_text_config()._attn_implementation = name  # the model's setter would look for a package
        self._original_attn_impl = given  # which transformers sets again at the end
        _say("graftq: continuous batching of packed models attends by torch's flash attention (docs/generating.md)")

    return switch_to_cb_friendly_attn


def _can_switch(model: Any) -> bool:
    return is_loaded_packed(model) and paged_attention.can_attend(model)


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
            and not (attention == "sdpa" and paged_attention.can_attend(self))
        ):
            _say(
                f"graftq: with {attention} attention, transformers runs continuous batching without CUDA graphs, and "
                "waits for the host at every step; ContinuousBatchingConfig(use_cuda_graph=True) does not "
                "(docs/generating.md)"
            )
        return original(self, generation_config, continuous_batching_config, *args, **kwargs)

    return init_continuous_batching


def _say(line: str) -> None:
    if line not in _said:
        _said.add(line)
        logger.info(line)
