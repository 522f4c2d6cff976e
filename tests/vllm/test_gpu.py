"""On a GPU, without vLLM: the layers that the adapter makes, run eagerly, compiled, and in CUDA graphs as vLLM does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.cuda_graphs import Graphs
from support.gptq import Recipe
from support.models import relative_error
from support.vllm_layers import Checkpoint, create, experts_layer, fused_layer
from support.vllm_stand_in import LinearBase, ParallelLMHead, installed

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

DEVICE = "cuda"
DTYPES = [torch.float16, torch.bfloat16]
LIMIT = {torch.float16: 3e-3, torch.bfloat16: 2e-2}
RECIPES = [Recipe(4), Recipe(3, 128), Recipe(2, sym=False, checkpoint_format="gptq_v2"), Recipe(8, -1)]
ATTENTION, EXPERTS = "model.layers.0.self_attn", "model.layers.0.mlp.experts"
WIDTH = 256

Made = tuple[Any, Any, torch.Tensor]
"""A layer, its method, and the weight [N, K] that it stands for."""


@pytest.fixture(scope="module", autouse=True)
def stand_in() -> Iterator[None]:
    with installed("0.32.0"):
        yield


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return Checkpoint(tmp_path)


def _q_k_v(checkpoint: Checkpoint, recipe: Recipe, dtype: torch.dtype) -> Made:
    names = {shard: f"{ATTENTION}.{shard}_proj" for shard in "qkv"}
    for shard, name in names.items():
        checkpoint.add(name, 128 if shard == "q" else 64, WIDTH, recipe)
    with torch.device(DEVICE):
        layer, method = fused_layer(checkpoint.config(), f"{ATTENTION}.qkv_proj", 0, 1, WIDTH, [128, 64, 64], dtype)
    for shard, name in names.items():
        checkpoint.hand_over(layer, name, shard)
    return layer, method, torch.cat([checkpoint.weights[name] for name in names.values()])


def _half_of_the_rows(checkpoint: Checkpoint, recipe: Recipe, dtype: torch.dtype) -> Made:
    name, layer = f"{ATTENTION}.o_proj", LinearBase(rank=1)
    checkpoint.add(name, 192, 2 * WIDTH, recipe)
    with torch.device(DEVICE):
        method = checkpoint.config().get_quant_method(layer, name)
        create(method, layer, WIDTH, [192], (2 * WIDTH, 192), dtype)
    checkpoint.hand_over(layer, name)
    return layer, method, checkpoint.weights[name][:, WIDTH:]


def _padded_vocabulary(checkpoint: Checkpoint, recipe: Recipe, dtype: torch.dtype) -> Made:
    checkpoint.add("lm_head", 100, WIDTH, recipe)
    own = SimpleNamespace(org_vocab_start_index=0, org_vocab_end_index=100)
    layer = ParallelLMHead(org_vocab_size=100, shard_indices=own)
    with torch.device(DEVICE):
        method = checkpoint.config().get_quant_method(layer, "lm_head")
        create(method, layer, WIDTH, [128], (WIDTH, 128), dtype)
    checkpoint.hand_over(layer, "lm_head")
    return layer, method, torch.nn.functional.pad(checkpoint.weights["lm_head"], (0, 0, 0, 28))


LAYERS = {"q, k and v": _q_k_v, "half of the rows": _half_of_the_rows, "padded vocabulary": _padded_vocabulary}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_linear(kind: str, recipe: Recipe, dtype: torch.dtype, compiled: bool, checkpoint: Checkpoint) -> None:
    layer, method, weight = LAYERS[kind](checkpoint, recipe, dtype)
    method.process_weights_after_loading(layer)
    assert {packed.kernel for packed in layer.graftq} == {"triton"}

    def call(x: torch.Tensor) -> torch.Tensor:
        return method.apply(layer, x * 2) / 2  # something for the compiler to fuse

    def inputs(tokens: int) -> tuple[torch.Tensor, ...]:
        return (torch.randn(tokens, WIDTH, device=DEVICE, dtype=dtype),)

    with torch.inference_mode():
        if compiled:
            torch.compiler.reset()
            call = torch.compile(call, fullgraph=True, dynamic=True)
        graphs = Graphs(call, inputs)
        for tokens in (1, 64, 8, 1):
            (x,) = inputs(tokens)
            expected = x.float() @ weight.to(DEVICE).T
            assert relative_error(call(x).float(), expected) < LIMIT[dtype]
            assert relative_error(graphs(x).float(), expected) < LIMIT[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize(
    ("ranks", "mine"),
    [(1, range(4)), (2, range(4)), (1, range(1, 4))],
    ids=["alone", "halves", "other experts elsewhere"],
)
def test_experts(ranks: int, mine: range, recipe: Recipe, dtype: torch.dtype, checkpoint: Checkpoint) -> None:
    """The ranks' parts add up; which inner features each has is theirs to choose."""
    checkpoint.add_experts(EXPERTS, 4, WIDTH, 192, recipe)
    made = [experts_layer(checkpoint, EXPERTS, 4, mine, rank, ranks, dtype, DEVICE) for rank in range(ranks)]
    assert all(layer.graftq.kernel == "triton" for layer, _ in made)

    def call(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        parts = [method.apply(layer, x, weights, ids, None, None).float() for layer, method in made]
        return torch.stack(parts).sum(0)

    def inputs(tokens: int) -> tuple[torch.Tensor, ...]:
        weights, ids = torch.randn(tokens, 4, device=DEVICE).softmax(-1).topk(2)
        return torch.randn(tokens, WIDTH, device=DEVICE, dtype=dtype), weights, ids.int()

    with torch.inference_mode():
        graphs = Graphs(call, inputs)
        for tokens in (1, 64, 8, 1):
            x, weights, ids = inputs(tokens)
            expected = checkpoint.experts(EXPERTS, x.float().cpu(), ids.cpu(), weights.cpu(), mine, slice(None))
            for found in (call(x, weights, ids), graphs(x, weights, ids)):
                assert relative_error(found.float().cpu(), expected) < LIMIT[dtype]
