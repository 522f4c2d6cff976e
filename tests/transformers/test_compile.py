"""``torch.compile`` of models as they come from ``from_pretrained``, with no eager call first, into one graph."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.loading import load
from support.models import logits, relative_error


def by_pickle(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


CASES: dict[str, tuple[str, Callable[[Any], Any], dict[str, Any]]] = {
    "mixture": ("mixtral", lambda model: model, {}),
    "copy of a mixture": ("mixtral", copy.deepcopy, {}),
    "pickled mixture": ("mixtral", by_pickle, {}),
    "mixture of any number of tokens": ("mixtral", lambda model: model, {"dynamic": True}),
    "dense model": ("llama", lambda model: model, {}),
    "pickled dense model": ("llama", by_pickle, {}),
}


@pytest.mark.skipif(
    not hasattr(torch.compiler, "is_exporting"),
    reason="torch 2.6 compiles no model of transformers, float ones neither",
)
@pytest.mark.parametrize("case", CASES)
def test_one_graph_without_an_eager_call(case: str, originals: dict[str, Path]) -> None:
    torch._dynamo.reset()
    name, made, options = CASES[case]
    model = made(load(originals[name]))
    model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager", **options)
    assert relative_error(logits(model), logits(load(originals[name].parent / "float"))) < 1e-5


@pytest.mark.parametrize("kernel", ["cpu", "torch"])
def test_a_layer_with_every_kernel(kernel: str, originals: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setenv("GRAFTQ_KERNEL", kernel)
    layer = load(originals["llama"]).model.layers[0].mlp.down_proj
    x = torch.randn(3, layer.in_features)
    wanted = torch.nn.functional.linear(x, layer.weight)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(x), wanted) < 1e-5
