"""Projections in a folder, and what they stand for, to be handed over to an engine's layers tensor by tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn import functional

from support.gptq import Recipe, quantize

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
EXPERT = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
"""An expert's projections, and the engines' names for them."""


class ServedCheckpoint:
    """A folder with projections, and what they stand for."""

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

    def write(self) -> None:
        """Write the files."""
        save_file(self.tensors, self.folder / "model.safetensors")
        (self.folder / "config.json").write_text(json.dumps(self.model))

    def hand_over(self, layer: Any, name: str, *shard: Any) -> None:
        """Do what the models' loaders do for one projection."""
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
