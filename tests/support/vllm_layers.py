"""Layers of vLLM's stand-in, created and filled as vLLM does it, and what they should compute."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn import functional

from support.gptq import Recipe, quantize
from support.vllm_stand_in import LinearBase, RoutedExperts

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
EXPERT = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
"""An expert's projections, and vLLM's names for them."""


class Checkpoint:
    """A folder with projections, what they stand for, and a configuration that has looked at it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.tensors: dict[str, torch.Tensor] = {}
        self.weights: dict[str, torch.Tensor] = {}
        self.rng = np.random.default_rng(0)
        self.recipe = Recipe()
        self.model: dict[str, Any] = {"num_hidden_layers": 1}

    def add(self, name: str, n: int, k: int, recipe: Recipe, like: str = "") -> None:
        """Add a projection; ``like`` names one whose permutation it shares."""
        rng = np.random.default_rng(7) if like else self.rng
        packed, self.weights[name] = quantize(torch.randn(n, k, generator=_generator(name)), recipe, rng)
        self.tensors.update({f"{name}.{suffix}": tensor for suffix, tensor in packed.items()})
        self.recipe = recipe

    def add_experts(self, prefix: str, count: int, hidden: int, inner: int, recipe: Recipe) -> None:
        """Add the projections of that many experts."""
        for expert in range(count):
            for name in EXPERT:
                shape = (hidden, inner) if name == "down_proj" else (inner, hidden)
                self.add(f"{prefix}.{expert}.{name}", *shape, recipe)

    def config(self) -> Any:
        """Write the files, and have the adapter look at them."""
        from graftq.adapters.vllm.config import GraftqConfig

        save_file(self.tensors, self.folder / "model.safetensors")
        (self.folder / "config.json").write_text(json.dumps(self.model))
        config = GraftqConfig.from_config(self.recipe.config())
        config.maybe_update_config(str(self.folder))
        config.packed_modules_mapping = FUSED
        return config

    def hand_over(self, layer: Any, name: str, *shard: Any) -> None:
        """Do what vLLM's loaders do for one projection."""
        for suffix in ("g_idx", "qweight", "qzeros", "scales"):
            if f"{name}.{suffix}" in self.tensors:
                parameter = getattr(layer, suffix)
                parameter.weight_loader(parameter, self.tensors[f"{name}.{suffix}"], *shard)

    def hand_over_expert(self, layer: Any, name: str, shard: str, expert: int) -> None:
        """The same for one projection of an expert."""
        for suffix in ("g_idx", "qweight", "qzeros", "scales"):
            own = f"{'w2' if shard == 'w2' else 'w13'}_{suffix}"
            parameter = getattr(layer, own)
            parameter.weight_loader(
                param=parameter,
                loaded_weight=self.tensors[f"{name}.{suffix}"],
                weight_name=f"experts.{own}",
                shard_id=shard,
                expert_id=expert,
                return_success=True,
            )

    def experts(
        self, prefix: str, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, mine: range, rows: slice
    ) -> torch.Tensor:
        """What the experts ``mine`` add, with only the given ``rows`` of their inner width; all in float32."""
        out = torch.zeros_like(x)
        for token, slot in np.ndindex(*ids.shape):
            if (expert := int(ids[token, slot])) in mine:
                gate, down, up = (self.weights[f"{prefix}.{expert}.{name}"] for name in EXPERT)
                inner = functional.silu(x[token] @ gate[rows].T) * (x[token] @ up[rows].T)
                out[token] += weights[token, slot] * (inner @ down[:, rows].T)
        return out


def _generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(len(name) + sum(map(ord, name)))


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
