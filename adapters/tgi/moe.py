"""The experts of a sparse layer on the flash path; replaces the server's own fused layers."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from graftq.adapters.tgi.loader import columns, share, unbound_linear
from graftq.adapters.tgi.routing import choose_experts
from graftq.plugin.manager import choose_kernel
from graftq.quant_linear.activations import Activation
from graftq.quant_linear.experts import QuantExpert, QuantExperts
from graftq.quant_linear.gpu.warmup import MOST_TOKENS, compile_kernels
from graftq.quant_linear.linear import QuantLinear
from graftq.quant_linear.sharding import Shard


class PackedMoE(nn.Module):
    """What the server's ``SparseMoELayer`` holds: ``down(silu(gate(x)) * up(x))`` of each token's experts, weighted.

    Each of several ranks has a share of every expert, and the model adds the results up. The arguments are
    those of ``SparseMoELayer``.
    """

    def __init__(
        self,
        *,
        n_expert_group: int | None,
        n_experts: int,
        prefix: str,
        renormalize: bool,
        topk: int,
        topk_group: int | None,
        weights: Any,
        scoring_func: str | None = "softmax",
        e_score_correction_bias: torch.Tensor | None = None,
        gate_proj_name: str = "gate_proj",
        up_proj_name: str = "up_proj",
        down_proj_name: str = "down_proj",
    ):
        super().__init__()
        if (n_expert_group is None) != (topk_group is None):
            raise ValueError("n_expert_group and topk_group: both or neither")
        self.routing: dict[str, Any] = {
            "top_k": topk,
            "renormalize": renormalize,
            "scoring": scoring_func or "softmax",
            "correction_bias": e_score_correction_bias,
            "groups": n_expert_group,
            "top_groups": topk_group,
        }
        names = {"gate_proj": gate_proj_name, "up_proj": up_proj_name, "down_proj": down_proj_name}
        experts = [
            QuantExpert({ours: _projection(weights, f"{prefix}.{number}.{name}", ours) for ours, name in names.items()})
            for number in range(n_experts)
        ]
        self.experts = QuantExperts(experts, choose_kernel, Activation("silu"))
        self.experts.bind(weights.device.type, weights.dtype)
        # Compile kernels and allocate workspaces before the server takes the free memory for its cache.
        if weights.device.type != "cpu":
            hidden = self.experts.spec.of("down_proj")[0].out_features
            zeros = partial(torch.zeros, device=weights.device)

            def run(tokens: int) -> torch.Tensor:
                states = zeros((tokens, hidden), dtype=weights.dtype)
                return self(states, gating_output=zeros((tokens, n_experts)))

            run(1)
            compile_kernels(self.experts, run, MOST_TOKENS)

    def forward(self, x: torch.Tensor, *, gating_output: torch.Tensor) -> torch.Tensor:
        """Run the chosen experts.

        Args:
            x: [tokens, hidden].
            gating_output: The router's logits, [tokens, experts].

        Returns:
            [tokens, hidden]: this rank's term of the sum.
        """
        index, expert_weights = choose_experts(gating_output, **self.routing)
        return self.experts(x, index, expert_weights)


def _projection(weights: Any, prefix: str, role: str) -> QuantLinear:
    """This rank's share of one expert's projection, as stored; the experts are repacked together."""
    loader = weights.loader
    one = loader.read(weights, prefix)
    loader.refuse_lost_bias(one.lost_bias)
    shard: Shard
    if role == "down_proj":
        shard = loader.rows(weights, prefix, one)
    else:
        (shard,) = columns(one, [share(prefix, one.spec.out_features, weights.process_group)])
    return unbound_linear(shard, weights.device, weights.dtype)
