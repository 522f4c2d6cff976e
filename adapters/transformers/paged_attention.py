"""Attention of continuous batching by torch's own flash attention, for packed models where its package is missing.

Without flash attention, transformers' continuous batching attends from every token of all sequences to every key of all
sequences, through a mask that it makes anew for each step.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

NAME = "torch_flash"
"""The implementation's name. transformers makes no masks, and uses CUDA graphs, for names with "flash" in them."""

MORE = re.compile(r"^ +(s_aux|sinks|softcap|position_bias|indices|block_indices)=", re.MULTILINE)
"""Arguments of attention functions that change what attention is."""

WIDEST = 256
"""The widest head that it takes."""


def register() -> None:
    """Make the implementation known to transformers, under the names that its versions ask for."""
    from transformers import AttentionInterface

    for name in (NAME, f"paged|{NAME}"):
        AttentionInterface.register(name, attend)


def can_attend(model: Any) -> bool:
    """Whether torch's flash attention does all that the attention of this model does."""
    config = model.config.get_text_config()
    width = getattr(config, "head_dim", None)
    if width is None and (heads := getattr(config, "num_attention_heads", None)):
        width = config.hidden_size // heads
    return (
        _kernel() is not None
        and model.device.type == "cuda"
        and torch.cuda.get_device_capability(model.device) >= (8, 0)
        and model.dtype in (torch.float16, torch.bfloat16)
        and bool(model._supports_flash_attn)
        and not getattr(model, "_compatible_flash_implementations", None)
        and width is not None
        and width <= WIDEST
        and width % 8 == 0
        and getattr(config, "v_head_dim", None) in (None, width)
        and not _asks_for_more(sys.modules[type(model).__module__])
    )


@functools.cache
def _asks_for_more(modeling: ModuleType) -> bool:
    """Whether a model's code gives its attention something that is not in :func:`attend`."""
    try:
        return MORE.search(inspect.getsource(modeling)) is not None
    except OSError:  # there is no source
        return True


@torch.compiler.disable
def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    *,
    cu_seq_lens_q: torch.Tensor,
    cu_seq_lens_k: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of sequences that lie side by side, each causal within itself.

    Args:
        module: The attention module.
        query: [1, heads, tokens, head_dim].
        key, value: [1, num_key_value_heads, keys, head_dim]; of the new tokens alone before transformers 5.19.
        attention_mask: Always None.
        scaling: Of the products.
        cu_seq_lens_q, cu_seq_lens_k: int [sequences + 1], where the sequences begin; of the keys there may be a
            dictionary by the layer's type.
        kwargs: ``max_length_q`` and ``max_length_k`` (``max_seqlen_q`` and ``max_seqlen_k`` before 5.19), the
            ``sliding_window`` of some models, and, before 5.19, the paged ``cache`` with its indices.

    Returns:
        [1, tokens, heads, head_dim]; tokens behind the last sequence have no meaning.
    """
    longest_q, longest_k = (
        kwargs[f"max_length_{of}"] if f"max_length_{of}" in kwargs else kwargs[f"max_seqlen_{of}"] for of in "qk"
    )
    window = kwargs.get("sliding_window") or getattr(module, "sliding_window", None)
    if isinstance(cu_seq_lens_k, dict):
        kind = "sliding_attention" if window else "full_attention"
        cu_seq_lens_k, longest_k = cu_seq_lens_k[kind], longest_k[kind]
    if (paged := kwargs.get("cache")) is not None:
        key, value = paged.update(
            key_states=key,
            value_states=value,
            layer_idx=module.layer_idx,
            read_index=kwargs["read_index"],
            write_index=kwargs["write_index"],
        )
    else:
        key, value = key[0].transpose(0, 1), value[0].transpose(0, 1)
    kernel = _kernel()
    assert kernel is not None
    out = kernel(
        *(query[0].transpose(0, 1).contiguous(), key.contiguous(), value.contiguous()),
        *(cu_seq_lens_q.to(torch.int32), cu_seq_lens_k.to(torch.int32), longest_q, longest_k),
        scale=scaling,
        window_size=(window - 1 if window else -1, 0),
    )
    return out[None], None


@functools.cache
def _kernel() -> Callable[..., Any] | None:
    """``torch.nn.attention.varlen.varlen_attn`` with groups of heads, or None if this version of torch lacks it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    parameters = inspect.signature(varlen_attn).parameters
    if "window_size" not in parameters:
        return None
    grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in parameters else {}
    return functools.partial(varlen_attn, **grouped)
