"""Activations are named by what they compute."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from graftq.quant_linear.activations import Activation, recognize

SILU = functional.silu


def gated(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    def activate(x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        return function(gate) * up

    return activate


def gpt_oss(x: torch.Tensor, alpha: float = 1.702, limit: float = 7.0) -> torch.Tensor:
    gate, up = x[..., ::2].clamp(max=limit), x[..., 1::2].clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(gate * alpha)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("silu", SILU),
        ("gelu", functional.gelu),
        ("gelu_tanh", torch.nn.GELU("tanh")),
        ("relu", torch.relu),
        ("relu2", lambda x: torch.relu(x) ** 2),
    ],
)
def test_known(name: str, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    assert recognize(gated(function), is_gated=True, is_concatenated=True) == Activation(name)
    assert recognize(function, is_gated=False, is_concatenated=True) == Activation(name)


def test_gpt_oss() -> None:
    assert recognize(gpt_oss, is_gated=True, is_concatenated=False) == Activation("swiglu_oai", 1.702, 7.0)


@pytest.mark.parametrize(
    "activate",
    [
        lambda x: gpt_oss(x, limit=1000.0),
        gated(lambda x: x * torch.sigmoid(1.702 * x)),
        gated(lambda x: SILU(x).clamp(max=30)),
        lambda x: SILU(x[..., ::2]) * x[..., 1::2],
        torch.nn.Linear(4, 2),
        lambda x: torch.ones(3),
    ],
    ids=["another limit", "quick gelu", "a limit far out", "interleaved", "weights", "nonsense"],
)
def test_unknown(activate: Callable[[torch.Tensor], torch.Tensor]) -> None:
    assert recognize(activate, is_gated=True, is_concatenated=True) is None


def test_under_a_meta_device() -> None:
    with torch.device("meta"):
        assert recognize(gated(SILU), is_gated=True, is_concatenated=True) == Activation("silu")
