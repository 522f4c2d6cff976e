"""Mixtral's sparse block of transformers 4, with all experts run at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from graftq.plugin.manager import choose_kernel
from graftq.quant_linear.experts import QuantExpert, QuantExperts
from graftq.quant_linear.linear import QuantLinear

PROJECTIONS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def fuse_experts(model: nn.Module) -> None:
    """Replace the experts of every Mixtral block, where all are packed, by one :class:`QuantExperts`.

    Blocks of other models keep their loop over experts, each a module of packed layers.
    """
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    # A subclass, so that code that tests for the block's class still recognizes it.
    fused = type(MixtralSparseMoeBlock.__name__, (MixtralSparseMoeBlock,), {"forward": _forward})
    for block in model.modules():
        if type(block) is MixtralSparseMoeBlock and _all_packed(block.experts):
            _fuse(block)
            block.__class__ = fused


def _all_packed(experts: Any) -> bool:
    """Whether every projection is packed and in memory; offloaded ones are loaded layer by layer."""
    layers = [getattr(expert, name) for expert in experts for name in PROJECTIONS.values()]
    return all(isinstance(layer, QuantLinear) and not layer.qweight.is_meta for layer in layers)


def _fuse(block: Any) -> None:
    act = block.experts[0].act_fn

    def activate(gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return act(gate) * up

    experts = [
        QuantExpert({ours: getattr(one, theirs) for ours, theirs in PROJECTIONS.items()}) for one in block.experts
    ]
    block.experts = QuantExperts(experts, choose_kernel, activate)


def _forward(self: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Route each token to its experts; returns what the stock block does, states and router logits."""
    x = hidden_states.view(-1, hidden_states.shape[-1])
    logits = self.gate(x)
    weights, index = torch.topk(functional.softmax(logits, dim=1, dtype=torch.float), self.top_k, dim=-1)
    weights = (weights / weights.sum(dim=-1, keepdim=True)).to(x.dtype)
    return self.experts(x, index, weights).view_as(hidden_states), logits
