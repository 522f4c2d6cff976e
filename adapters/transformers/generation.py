"""``generate`` with a packed model on a GPU: the host does not wait for it at each step, nor at each layer of a prompt.

The host goes on to the next step before it knows whether to stop. transformers has this as ``DeferredStopCheck`` (from
5.17 on), and lets it work on "mps" alone.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from contextvars import ContextVar
from types import ModuleType
from typing import Any

import torch

from graftq.plugin.patching import replace_attribute

DEVICES = {"cuda"}
"""Types of device that run ahead of the host, beside those that transformers names itself."""

_is_packed: ContextVar[bool] = ContextVar("graftq_generates", default=False)
"""Whether the model that generates in this context is packed."""


def patch_generation(module: ModuleType) -> None:
    """Let packed models on a GPU run ahead of it, in ``transformers.generation.utils``."""
    replace_attribute(module.GenerationMixin, "_sample", _tell_packed)
    replace_attribute(module.GenerationMixin, "_prepare_static_cache", _count_on_device)
    replace_attribute(module, "DeferredStopCheck", _for_packed)


def is_loaded_packed(model: Any) -> bool:
    """Whether graftq has loaded or made the packed layers of this model."""
    from graftq.adapters.transformers.quantizer import GptqHfQuantizer  # which needs more than is imported yet

    return isinstance(getattr(model, "hf_quantizer", None), GptqHfQuantizer)


def _tell_packed(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        token = _is_packed.set(is_loaded_packed(self))
        try:
            return original(self, *args, **kwargs)
        finally:
            _is_packed.reset(token)

    return _sample


def _count_on_device(original: Callable[..., Any]) -> Callable[..., Any]:
    """Let the layers of a static cache count their tokens on the GPU from the start.

    transformers makes these counts on the CPU for every call of ``generate``, and copies each when its layer sees the
    prompt. Such a copy waits until the GPU has done all that was asked of it before.
    """

    @functools.wraps(original)
    def _prepare_static_cache(self: Any, *args: Any, **kwargs: Any) -> Any:
        cache = original(self, *args, **kwargs)
        if self.device.type in DEVICES and is_loaded_packed(self):
            for layer in getattr(cache, "layers", ()):
                count = getattr(layer, "cumulative_length", None)
                if isinstance(count, torch.Tensor) and count.device.type == "cpu":
                    layer.cumulative_length = torch.full_like(count, int(count), device=self.device)
        return cache

    return _prepare_static_cache


def _for_packed(stock: Any) -> Any:
    class DeferredStopCheck(stock):
        """The stock class, which packed models use on :data:`DEVICES` too.

        The step that is undone after the last token has drawn a random number; that is undone as well, so that what is
        sampled next with this seed is what it would have been.
        """

        def __init__(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any):
            super().__init__(input_ids, *args, **kwargs)
            device = input_ids.device
            self._generator = _default_generator(device) if _is_deferred(device) else None
            self._states: deque[torch.Tensor] = deque(maxlen=2)

        @staticmethod
        def is_supported(device: torch.device, *args: Any, **kwargs: Any) -> bool:
            # Upstream: never on other devices than mps, for an assistant, or with a cache that is returned and that
            # cannot be cropped. All but the first stays.
            return bool(stock.is_supported(torch.device("mps") if _is_deferred(device) else device, *args, **kwargs))

        def __call__(self, *args: Any, **kwargs: Any) -> bool:
            if self._generator is not None:
                self._states.append(self._generator.get_state())
            return bool(super().__call__(*args, **kwargs))

        def finish(self) -> int:
            undone = int(super().finish())
            if undone and self._generator is not None:
                self._generator.set_state(self._states[0])
            return undone

    return DeferredStopCheck


def _is_deferred(device: torch.device) -> bool:
    return device.type in DEVICES and _is_packed.get()


def _default_generator(device: torch.device) -> torch.Generator:
    if device.type == "cpu":
        return torch.default_generator
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.cuda.default_generators[index]
