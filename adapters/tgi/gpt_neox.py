"""GPT-NeoX on the flash path, whose code wants the queries of all heads first, then all keys, then all values.

The files store query, key and value head by head. The server reorders plain weights and all biases, but not packed
weights: without this patch it raises nothing and generates nonsense.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from graftq.adapters.tgi.loader import PackedLoader, PackedWeight, share
from graftq.quant_linear.sharding import select_outputs


def reorder_packed(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``load_qkv``; ``num_heads`` is this rank's number of heads."""

    @functools.wraps(original)
    def load_qkv(config: Any, prefix: str, weights: Any, num_heads: int, head_size: int, hidden_size: int) -> Any:
        loader = weights.loader
        if getattr(loader, "checkpoint", None) is None or not loader.is_packed(weights, prefix):
            return original(config, prefix, weights, num_heads, head_size, hidden_size)
        with weights.use_loader(_HeadByHead(loader, num_heads, head_size)):
            return original(config, prefix, weights, num_heads, head_size, hidden_size)

    return load_qkv


class _HeadByHead:
    """Replaces the loader while one layer's query, key and value are loaded."""

    def __init__(self, loader: PackedLoader, num_heads: int, head_size: int):
        self.loader = loader
        self.order = torch.arange(num_heads * 3 * head_size).view(num_heads, 3, head_size).transpose(0, 1).flatten()

    def get_multi_weights_col(self, weights: Any, prefixes: Sequence[str], dim: int) -> PackedWeight:
        """This rank's heads of the one projection, reordered."""
        (prefix,) = prefixes
        one = self.loader.read(weights, prefix)
        start, _ = share(prefix, one.spec.out_features, weights.process_group)
        shard = select_outputs(one.tensors, one.spec, start + self.order)
        return PackedWeight(self.loader, [shard], weights.device, weights.dtype, one.lost_bias)
