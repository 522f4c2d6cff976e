"""On a GPU: what the loader hands over is ready, and the server's CUDA graphs can hold it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.checkpoints import write_pair
from support.gptq import Recipe
from support.models import relative_error, tiny
from tgi.standins import Weights, installed
from tgi.test_contract import ATTENTION, EXPERTS, make_loader, twin

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

SIZES = {"hidden_size": 256, "intermediate_size": 384, "head_dim": 64}
RECIPES = [Recipe(bits=4), Recipe(bits=3, group_size=128), Recipe(bits=8, group_size=-1), Recipe(bits=2, sym=False)]


def capture(layer: torch.nn.Module, *arguments: torch.Tensor, **named: torch.Tensor) -> torch.Tensor:
    """Run ``layer`` once in a graph, and replay it; the server, too, calls a size once before it captures it."""
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = layer(*arguments, **named)
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    return out


@pytest.mark.parametrize("tokens", [1, 8, 32])
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_captured_after_loading(recipe: Recipe, tokens: int, tmp_path: Path) -> None:
    model = write_pair(tmp_path, tiny("mixtral", **SIZES), recipe)
    state = twin(model)
    with installed(model) as server:
        place = {"dtype": torch.float16, "device": torch.device("cuda")}
        weights = Weights(model / "model.safetensors", make_loader(server, model), **place)
        names = [f"{ATTENTION}.{one}_proj" for one in "qkv"]
        linear = weights.loader.get_multi_weights_col(weights, names, 0).get_linear(None)
        experts = server["text_generation_server.layers.moe"].SparseMoELayer(
            n_expert_group=None,
            n_experts=4,
            prefix=EXPERTS,
            renormalize=True,
            topk=2,
            topk_group=None,
            weights=weights,
            gate_proj_name="w1",
            up_proj_name="w3",
            down_proj_name="w2",
        )
    x = torch.randn(tokens, 256, device="cuda", dtype=torch.float16)
    logits = torch.randn(tokens, 4, device="cuda")
    dense = torch.cat([state[f"{name}.weight"] for name in names]).cuda()
    with torch.no_grad():
        assert relative_error(linear(x).float(), x.float() @ dense.T) < 2e-3
        eager = experts(x, gating_output=logits)
    assert relative_error(capture(linear, x).float(), x.float() @ dense.T) < 2e-3
    assert relative_error(capture(experts, x, gating_output=logits).float(), eager.float()) < 2e-3
