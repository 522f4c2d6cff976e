"""The routing of tokens to experts, in the variants of the server's sparse layer."""

from __future__ import annotations

import torch


def choose_experts(
    logits: torch.Tensor,
    *,
    top_k: int,
    renormalize: bool,
    scoring: str = "softmax",
    correction_bias: torch.Tensor | None = None,
    groups: int | None = None,
    top_groups: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose ``top_k`` experts for each token, without synchronizing with the device.

    Sources: Mixtral of Experts (2024); DeepSeek-V2 (2024) and -V3 (2024) for groups, sigmoid and correction bias.

    Args:
        logits: [tokens, experts] from the router.
        top_k: Experts per token.
        renormalize: Whether the chosen weights are scaled to sum to one.
        scoring: "softmax" or "sigmoid".
        correction_bias: [experts], added to the scores for choosing, not for weighting.
        groups: Number of groups that the experts fall into, or None.
        top_groups: Groups per token. A group counts as much as its best expert; with a correction bias, its best two.

    Returns:
        Indices int64 [tokens, top_k] and weights float32 [tokens, top_k].

    Raises:
        ValueError: for another scoring function.
    """
    if scoring not in ("softmax", "sigmoid"):
        raise ValueError(f"scoring function {scoring!r}; there are softmax and sigmoid")
    scores = logits.float().softmax(dim=-1) if scoring == "softmax" else logits.float().sigmoid()
    merit = scores if correction_bias is None else scores + correction_bias
    if groups is not None:
        assert top_groups is not None
        grouped = merit.view(merit.shape[0], groups, -1)
        best = 1 if correction_bias is None else min(2, grouped.shape[-1])
        chosen = grouped.topk(best, dim=-1).values.sum(dim=-1).topk(top_groups, dim=-1).indices
        outside = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(1, chosen, False)
        merit = grouped.masked_fill(outside[..., None], float("-inf")).flatten(1)
    index = merit.topk(top_k, dim=-1).indices
    weights = scores.gather(1, index)
    return index, weights / weights.sum(dim=-1, keepdim=True) if renormalize else weights
