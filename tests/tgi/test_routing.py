"""Routing, against the models' own code in transformers."""

from __future__ import annotations

import pytest
import torch
from support.models import tiny

from graftq.adapters.tgi.routing import choose_experts


def dense(index: torch.Tensor, weights: torch.Tensor, experts: int) -> torch.Tensor:
    """Weights by expert, [tokens, experts]; the order of the chosen ones does not matter."""
    return torch.zeros(len(index), experts).scatter(1, index, weights)


@pytest.mark.parametrize("renormalize", [True, False])
def test_softmax(renormalize: bool) -> None:
    logits = torch.randn(9, 8)
    probabilities = logits.softmax(-1)
    best = probabilities >= probabilities.topk(3).values[:, -1:]
    expected = probabilities * best
    if renormalize:
        expected = expected / expected.sum(-1, keepdim=True)
    found = dense(*choose_experts(logits, top_k=3, renormalize=renormalize), 8)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("renormalize", [True, False])
def test_groups_with_sigmoid_and_correction_bias_as_deepseek_v3(renormalize: bool) -> None:
    model = tiny("deepseek_v3", n_routed_experts=8, n_group=4, topk_group=2, norm_topk_prob=renormalize)
    gate = model.model.layers[1].mlp.gate
    gate.e_score_correction_bias.copy_(torch.rand(8))
    with torch.no_grad():
        logits, weights, index = gate(torch.randn(9, 64))
    expected = dense(index, weights / gate.routed_scaling_factor, 8)
    found = choose_experts(
        logits,
        top_k=2,
        renormalize=renormalize,
        scoring="sigmoid",
        correction_bias=gate.e_score_correction_bias,
        groups=4,
        top_groups=2,
    )
    torch.testing.assert_close(dense(*found, 8), expected)


def test_groups_count_as_much_as_their_best_expert() -> None:
    logits = torch.tensor([[3.0, -9.0, 2.0, 1.9, 1.8, 1.7]])
    index, _ = choose_experts(logits, top_k=2, renormalize=False, groups=3, top_groups=2)
    assert sorted(index[0].tolist()) == [0, 2]
    index, _ = choose_experts(logits, top_k=2, renormalize=False, groups=3, top_groups=1)
    assert sorted(index[0].tolist()) == [0, 1]


def test_half_precision_logits_are_scored_in_float32() -> None:
    _, weights = choose_experts(torch.randn(4, 8, dtype=torch.bfloat16), top_k=2, renormalize=True)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(-1), torch.ones(4))


def test_another_scoring_function_is_refused() -> None:
    with pytest.raises(ValueError, match="scoring function 'tanh'"):
        choose_experts(torch.randn(1, 4), top_k=1, renormalize=False, scoring="tanh")
