"""The experts of a mixture-of-experts layer, each projection packed on its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from graftq.quant_linear.linear import QuantLinear

Activation = Callable[[torch.Tensor], torch.Tensor]


class QuantExpert(nn.Module):
    """One expert's projections: ``down_proj``, and ``gate_proj`` + ``up_proj``, ``gate_up_proj``, or ``up_proj``."""

    def __init__(self, projections: Mapping[str, QuantLinear]):
        super().__init__()
        for name, projection in projections.items():
            self.add_module(name, projection)


class QuantExperts(nn.Module):
    """``y[t] = sum_j weights[t, j] * expert[index[t, j]](x[t])`` over the chosen experts of each token.

    An expert computes ``down(activate(up(x)))``, where ``up`` gives gate and up values side by side
    (``is_concatenated``), interleaved, or up values alone. Experts may differ from each other, and an
    expert's projections among themselves, in bits, group and act-order.

    Args:
        experts: One per expert, in order.
        activate: From ``up``'s output [tokens, 2 * intermediate] (or [tokens, intermediate]) to
            ``down``'s input [tokens, intermediate]: gating and activation together.
        is_concatenated: Whether ``activate`` expects ``[gate; up]`` rather than gate and up interleaved.
        up_bias: [num_experts, ...] added to ``up``'s output, where the model keeps biases apart.
        down_bias: [num_experts, hidden] added to ``down``'s output, likewise.
        post_expert_norm: Applied to each expert's output before it is weighted.
    """

    def __init__(
        self,
        experts: list[QuantExpert],
        activate: Activation,
        is_concatenated: bool = True,
        up_bias: tuple[str, nn.Parameter] | None = None,
        down_bias: tuple[str, nn.Parameter] | None = None,
        post_expert_norm: nn.Module | None = None,
    ):
        super().__init__()
        self.num_experts = len(experts)
        self.is_concatenated = is_concatenated
        self.activate = activate
        self._bias_names = [None if bias is None else bias[0] for bias in (up_bias, down_bias)]
        for index, expert in enumerate(experts):
            self.add_module(str(index), expert)
        for bias in (up_bias, down_bias):
            if bias is not None:
                self.register_parameter(*bias)
        self.post_expert_norm = post_expert_norm

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Run the chosen experts.

        Args:
            hidden_states: [tokens, hidden].
            top_k_index: Integers [tokens, top_k]; values >= num_experts (another rank's experts) add nothing.
            top_k_weights: [tokens, top_k].

        Returns:
            [tokens, hidden] in the dtype of ``hidden_states``; the sum is taken in float32.
        """
        total = torch.zeros_like(hidden_states, dtype=torch.float32)
        for index in torch.unique(top_k_index).tolist():
            if index < self.num_experts:
                token, slot = torch.where(top_k_index == index)
                output = self._run(index, hidden_states[token]) * top_k_weights[token, slot, None]
                total.index_add_(0, token, output.to(torch.float32))
        return total.to(hidden_states.dtype)

    def _run(self, index: int, x: torch.Tensor) -> torch.Tensor:
        expert: Any = self.get_submodule(str(index))
        up_bias, down_bias = (None if name is None else getattr(self, name)[index] for name in self._bias_names)
        hidden = _add(self._up(expert, x), up_bias)
        output = _add(expert.down_proj(self.activate(hidden)), down_bias)
        return output if self.post_expert_norm is None else self.post_expert_norm(output)

    def _up(self, expert: Any, x: torch.Tensor) -> torch.Tensor:
        if hasattr(expert, "gate_up_proj"):
            return expert.gate_up_proj(x)
        if not hasattr(expert, "gate_proj"):
            return expert.up_proj(x)
        gate, up = expert.gate_proj(x), expert.up_proj(x)
        return torch.cat((gate, up), dim=-1) if self.is_concatenated else torch.stack((gate, up), dim=-1).flatten(-2)


def _add(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x if bias is None else x + bias.to(x.dtype)
