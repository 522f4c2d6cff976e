"""``Accelerator.save_model`` of a packed model: the checkpoint's tensors, by the names that its float twin's have."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import nn

from graftq.plugin.patching import replace_attribute

SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM")
"""Kinds of distribution in which no process has a whole model; accelerate gathers it by itself."""


def patch_accelerate(module: ModuleType) -> None:
    """Let accelerate write no kernel's layout, which only the kernel's own machine could read."""
    replace_attribute(module.Accelerator, "save_model", _save_checkpoint)


class _Stated(nn.Module):
    """What has a state dict, and nothing else: accelerate asks a model for no more."""

    def __init__(self, state: dict[str, torch.Tensor]):
        super().__init__()
        self.state = state

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:  # type: ignore[override]
        """The tensors to save."""
        return self.state


def _save_checkpoint(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def save_model(self: Any, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        from graftq.adapters.transformers.quantizer import GptqHfQuantizer  # which transformers has imported by then

        whole = self.unwrap_model(model)
        quantizer = vars(whole).get("hf_quantizer")  # not by `getattr`: PEFT's models have those of the model inside
        if isinstance(quantizer, GptqHfQuantizer) and self.distributed_type.value not in SHARDED:
            model = _Stated(quantizer.whole_state(whole))
        original(self, model, *args, **kwargs)

    return save_model
