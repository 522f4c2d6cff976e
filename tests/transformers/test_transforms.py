"""Transforms of ``torch.func`` through packed layers: what the float twin gives, or a refusal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.loading import load
from support.models import logits, relative_error

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own

TRANSFORMS: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "jvp": lambda layer, x: torch.func.jvp(layer, (x,), (x.flip(0),))[1],
    "jacfwd": lambda layer, x: torch.func.jacfwd(layer)(x[0]),
    "jacrev": lambda layer, x: torch.func.jacrev(layer)(x[0]),
    "grad": lambda layer, x: torch.func.grad(lambda y: layer(y).square().sum())(x),
    "vmap": lambda layer, x: torch.func.vmap(layer)(x),
    "functional_call": lambda layer, x: torch.func.functional_call(layer, {}, (x,)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_as_the_float_layer(name: str, originals: dict[str, Path]) -> None:
    folder, x = originals["llama"], torch.randn(3, 64)
    found, expected = (
        TRANSFORMS[name](load(each).model.layers[0].mlp.up_proj, x).detach()
        for each in (folder, folder.parent / "float")
    )
    assert relative_error(found, expected) < 1e-4


def test_experts_refuse(originals: dict[str, Path]) -> None:
    experts = load(originals["mixtral"]).model.layers[0].mlp.experts
    index, weights = torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1)
    x = torch.randn(3, 64)
    with pytest.raises(NotImplementedError, match="packed experts"):
        torch.func.jvp(lambda y: experts(y, index, weights), (x,), (x,))


def test_integers_are_refused(originals: dict[str, Path]) -> None:
    model = load(originals["llama"])
    logits(model)
    with pytest.raises(RuntimeError, match=r"takes floats, not torch\.int64"):
        model.model.layers[0].mlp.up_proj(torch.ones(2, 64, dtype=torch.long))
