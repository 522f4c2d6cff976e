"""Compiled decoding with SDPA and fewer heads of keys than of queries: packed models do not repeat keys and values.

transformers repeats them wherever a compiled step has a mask, and with a static cache it always has one: most of
SDPA's backends take groups of heads only without a mask. cuDNN's takes both.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch

from graftq.plugin.patching import replace_item

_VERDICT = "_graftq_groups_heads"
"""Attribute of a packed model's attention modules: whether SDPA was last seen able to take groups and a mask there."""


def patch_attention(functions: Any) -> None:
    """Let SDPA, among transformers' attention functions by name, keep the heads of marked modules grouped."""
    replace_item(functions, "sdpa", _group_heads)


def mark_attention(model: torch.nn.Module) -> None:
    """Mark the attention modules of a packed model; ``TRANSFORMERS_SDPA_FORCE_GQA=0`` leaves all as they are."""
    if os.environ.get("TRANSFORMERS_SDPA_FORCE_GQA") == "0":
        return
    for module in model.modules():
        if (getattr(module, "num_key_value_groups", None) or 1) > 1:
            setattr(module, _VERDICT, False)


def _group_heads(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def sdpa_attention_forward(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        if hasattr(module, _VERDICT):
            if not torch.compiler.is_compiling():
                _look(module, query, key)
            elif getattr(module, _VERDICT) and attention_mask is not None and _is_plain_step(query, kwargs):
                out = torch.nn.functional.scaled_dot_product_attention(
                    query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling, enable_gqa=True
                )
                return out.transpose(1, 2).contiguous(), None
        found: tuple[torch.Tensor, None] = original(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return found

    return sdpa_attention_forward


def _is_plain_step(query: torch.Tensor, arguments: dict[str, Any]) -> bool:
    """Whether this is one token of each sequence, without what stock SDPA adds."""
    special = any(arguments.get(name) is not None for name in ("position_bias", "softcap", "cache"))
    return query.shape[2] == 1 and not special


def _look(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor) -> None:
    """Renew the verdict in a call that is not compiled, as the prompt's is: compiled code cannot ask cuDNN."""
    is_possible = query.is_cuda and _groups_with_mask(
        query.device, query.dtype, query.shape[1], key.shape[1], query.shape[3], torch.backends.cuda.cudnn_sdp_enabled()
    )
    if getattr(module, _VERDICT) is not is_possible:
        setattr(module, _VERDICT, is_possible)


@functools.cache
def _groups_with_mask(
    device: torch.device, dtype: torch.dtype, heads: int, groups: int, width: int, is_enabled: bool
) -> bool:
    """Whether cuDNN takes a mask, and ``heads`` heads of queries over ``groups`` of keys."""
    query = torch.empty(1, heads, 1, width, dtype=dtype, device=device)
    key = torch.empty(1, groups, 64, width, dtype=dtype, device=device)
    mask = torch.empty(1, 1, 1, 64, dtype=torch.bool, device=device)
    parameters = torch.backends.cuda.SDPAParams(query, key, key, mask, 0.0, False, True)
    return is_enabled and torch.backends.cuda.can_use_cudnn_attention(parameters)
