"""Layers of vLLM's stand-in, created and filled as vLLM does it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from support.served_checkpoint import EXPERT, FUSED, ServedCheckpoint
from support.vllm_stand_in import LinearBase, RoutedExperts


class Checkpoint(ServedCheckpoint):
    """The same, and a configuration that has looked at it."""

    def config(self) -> Any:
        """Write the files, and have the adapter look at them."""
        from graftq.adapters.vllm.config import GraftqConfig

        self.write()
        config = GraftqConfig.from_config(self.recipe.config())
        config.maybe_update_config(str(self.folder))
        config.packed_modules_mapping = FUSED
        return config


def create(
    method: Any, layer: Any, inputs: int, sizes: list[int], whole: tuple[int, int], dtype: torch.dtype = torch.float32
) -> None:
    """Call ``create_weights`` as vLLM's linear layers do."""
    method.create_weights(
        layer=layer,
        input_size_per_partition=inputs,
        output_partition_sizes=sizes,
        input_size=whole[0],
        output_size=whole[1],
        params_dtype=dtype,
        weight_loader=None,
    )


def fused_layer(
    config: Any, prefix: str, rank: int, ranks: int, k: int, sizes: Sequence[int], dtype: torch.dtype = torch.float32
) -> tuple[Any, Any]:
    """A layer of several projections with ``sizes`` outputs in all, and its method; empty."""
    layer = LinearBase(rank)
    method = config.get_quant_method(layer, prefix)
    create(method, layer, k, [size // ranks for size in sizes], (k, sum(sizes)), dtype)
    return layer, method


def experts_layer(
    checkpoint: Checkpoint,
    prefix: str,
    total: int,
    mine: range,
    rank: int,
    ranks: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple[Any, Any]:
    """The experts ``mine`` out of ``total``, cut for a rank, and their method; loaded."""
    hidden, inner = checkpoint.weights[f"{prefix}.0.down_proj"].shape
    with torch.device(device):
        layer = RoutedExperts(prefix, mine, total, rank, ranks)
        method = checkpoint.config().get_quant_method(layer, prefix)
        method.create_weights(layer, len(mine), hidden, inner // ranks, dtype, weight_loader=None)
    for expert in range(total):
        for name, shard in EXPERT.items():
            checkpoint.hand_over_expert(layer, f"{prefix}.{expert}.{name}", shard, expert)
    method.process_weights_after_loading(layer)
    return layer, method
