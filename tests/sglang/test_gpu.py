"""On a GPU, without SGLang: the layers that the adapter makes, run eagerly and in CUDA graphs as SGLang does."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.cuda_graphs import Graphs
from support.gptq import Recipe
from support.models import relative_error
from support.sglang_layers import Checkpoint, dispatched, experts_layer, linear_layer
from support.sglang_stand_in import LinearBase, installed

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

DEVICE, DTYPE, WIDTH, LIMIT = "cuda", torch.bfloat16, 256, 2e-2
RECIPES = [Recipe(4, sym=False), Recipe(3, 128), Recipe(2, sym=False, checkpoint_format="gptq_v2"), Recipe(8, -1)]
ATTENTION, EXPERTS = "model.layers.0.self_attn", "model.layers.0.mlp.experts"


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("GRAFTQ_SGLANG", "all")
    with installed(chunked_prefill_size=64):
        importlib.import_module("graftq.adapters.sglang").register()
        yield


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return Checkpoint(tmp_path)


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize("part", ["q, k and v", "half of the rows"])
def test_linear(part: str, recipe: Recipe, checkpoint: Checkpoint) -> None:
    names = {"q": 128, "k": 64, "v": 64} if part == "q, k and v" else {"o": 192}
    rows = WIDTH if part == "q, k and v" else 2 * WIDTH
    for shard, size in names.items():
        checkpoint.add(f"{ATTENTION}.{shard}_proj", size, rows, recipe)
    layer = LinearBase() if len(names) == 3 else LinearBase(1, 2)
    own = f"{ATTENTION}.{'qkv' if len(names) == 3 else 'o'}_proj"
    with torch.device(DEVICE):
        linear_layer(checkpoint.config(), own, layer, (WIDTH, rows), list(names.values()), dtype=DTYPE)
    for shard in names:
        checkpoint.hand_over(layer, f"{ATTENTION}.{shard}_proj", *([shard] if len(names) == 3 else []))
    layer.quant_method.process_weights_after_loading(layer)
    assert {packed.kernel for packed in layer.graftq} == {"triton"}
    weight = torch.cat([checkpoint.weights[f"{ATTENTION}.{shard}_proj"] for shard in names])[:, -WIDTH:].to(DEVICE)

    def call(x: torch.Tensor) -> torch.Tensor:
        return layer.quant_method.apply(layer, x, None)

    def inputs(tokens: int) -> tuple[torch.Tensor, ...]:
        return (torch.randn(tokens, WIDTH, device=DEVICE, dtype=DTYPE),)

    with torch.inference_mode():
        graphs = Graphs(call, inputs)
        for tokens in (1, 64, 8, 1):
            (x,) = inputs(tokens)
            for found in (call(x), graphs(x)):
                assert relative_error(found.float(), x.float() @ weight.T) < LIMIT


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize(("ranks", "mine"), [(2, range(4)), (1, range(1, 4))], ids=["halves", "others elsewhere"])
def test_experts(ranks: int, mine: range, recipe: Recipe, checkpoint: Checkpoint) -> None:
    checkpoint.add_experts(EXPERTS, 4, WIDTH, 192, recipe)
    made = [
        experts_layer(checkpoint, EXPERTS, 4, mine, rank, ranks, DTYPE, DEVICE, routed_scaling_factor=2.5)
        for rank in range(ranks)
    ]
    assert all(layer.graftq.kernel == "triton" for layer in made)

    def call(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        given = dispatched(x, weights, ids, mine)
        return torch.stack([layer.quant_method.apply(layer, given).hidden_states.float() for layer in made]).sum(0)

    def inputs(tokens: int) -> tuple[torch.Tensor, ...]:
        weights, ids = torch.randn(tokens, 4, device=DEVICE).softmax(-1).topk(2)
        return torch.randn(tokens, WIDTH, device=DEVICE, dtype=DTYPE), weights, ids.int()

    with torch.inference_mode():
        graphs = Graphs(call, inputs)
        for tokens in (1, 64, 8, 1):
            x, weights, ids = inputs(tokens)
            expected = checkpoint.experts(EXPERTS, x.float().cpu(), ids.cpu(), weights.cpu(), mine, slice(None)) * 2.5
            for found in (call(x, weights, ids), graphs(x, weights, ids)):
                assert relative_error(found.cpu(), expected) < LIMIT
