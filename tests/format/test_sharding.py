"""Parts of a projection stand for the parts of its weight."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from support.gptq import Recipe, quantize
from support.specs import spec_of

from graftq.quant_linear.layouts import GptqTensors
from graftq.quant_linear.packing import dequantize
from graftq.quant_linear.sharding import join_outputs, select_outputs, shard_expert, shard_inputs, shard_outputs
from graftq.quant_linear.spec import QuantSpec

RECIPES = [
    Recipe(bits, group_size, desc_act, sym)
    for bits in (2, 3, 4, 8)
    for group_size, desc_act, sym in ((32, True, False), (32, False, True), (48, False, False), (-1, True, False))
]


def projection(recipe: Recipe, n: int = 40, k: int = 192) -> tuple[GptqTensors, QuantSpec, torch.Tensor]:
    tensors, weight = quantize(torch.randn(n, k), recipe, np.random.default_rng())
    tensors["bias"] = torch.randn(n)
    return GptqTensors(**tensors), spec_of(tensors, recipe, k, n, has_bias=True), weight


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_outputs(recipe: Recipe) -> None:
    whole, spec, weight = projection(recipe)
    for start, stop in pairwise((0, 3, 16, 40)):
        part, own = shard_outputs(whole, spec, start, stop)
        assert (own.in_features, own.out_features) == (192, stop - start)
        assert dequantize(part, own).equal(weight[start:stop])
        assert whole.bias is not None
        assert part.bias is not None
        assert part.bias.equal(whole.bias[start:stop])


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_outputs_in_another_order(recipe: Recipe) -> None:
    whole, spec, weight = projection(recipe)
    order = torch.randperm(40)[:33]
    part, own = select_outputs(whole, spec, order)
    assert own.out_features == 33
    assert dequantize(part, own).equal(weight[order])


@pytest.mark.parametrize("cuts", [(0, 64, 192), (0, 96, 192), (0, 5, 101, 192)], ids=str)
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_inputs(recipe: Recipe, cuts: tuple[int, ...]) -> None:
    whole, spec, weight = projection(recipe)
    for start, stop in pairwise(cuts):
        part, own = shard_inputs(whole, spec, start, stop, keep_bias=start == 0)
        assert (own.in_features, own.out_features) == (stop - start, 40)
        assert part.qweight.shape == (own.packed_rows, 40)
        assert dequantize(part, own).equal(weight[:, start:stop])
        assert own.has_bias == (part.bias is not None) == (start == 0)


def test_groups_that_are_cut_through_keep_their_scales() -> None:
    whole, spec, _ = projection(Recipe(group_size=64, desc_act=False))
    assert shard_inputs(whole, spec, 64, 192, keep_bias=False)[1].num_groups == 2
    assert shard_inputs(whole, spec, 32, 192, keep_bias=False)[1].num_groups == 3


@pytest.mark.parametrize(("start", "stop"), [(-1, 4), (4, 4), (0, 1000)])
def test_ranges_outside(start: int, stop: int) -> None:
    whole, spec, _ = projection(Recipe())
    with pytest.raises(ValueError, match="outputs"):
        shard_outputs(whole, spec, start, stop)
    with pytest.raises(ValueError, match="inputs"):
        shard_inputs(whole, spec, start, stop, keep_bias=True)


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_parts_join_to_the_whole(recipe: Recipe) -> None:
    tensors, weight = quantize(torch.randn(40, 192), recipe, np.random.default_rng())
    whole, spec = GptqTensors(**tensors), spec_of(tensors, recipe, 192, 40)
    parts = [shard_outputs(whole, spec, start, stop) for start, stop in pairwise((0, 3, 16, 40))]
    ((joined, own),) = join_outputs(parts)
    assert dequantize(joined, own).equal(weight)
    assert own.sym == spec.sym


def test_what_differs_stays_apart() -> None:
    projections = []
    for recipe in (Recipe(4), Recipe(4), Recipe(4, desc_act=False), Recipe(4, desc_act=False), Recipe(3)):
        tensors, _ = quantize(torch.randn(8, 64), recipe, np.random.default_rng())
        projections.append((GptqTensors(**tensors), spec_of(tensors, recipe, 64, 8)))
    assert [spec.out_features for _, spec in join_outputs(projections)] == [8, 8, 16, 8]


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_parts_do_not_keep_the_whole_in_memory(recipe: Recipe) -> None:
    """A rank that holds half of each projection has memory for half: a view keeps all of what it is a part of."""
    up, down = projection(recipe, 192, 64), projection(recipe)
    shares = shard_expert({"up": up[:2], "down": down[:2]}, "down", 96, 192, keep_bias=True)
    parts = [*shares.values(), shard_outputs(*down[:2], 16, 32), shard_inputs(*down[:2], 96, 192, keep_bias=True)]
    wholes = {
        tensor.untyped_storage().data_ptr(): tensor for tensor in (*vars(up[0]).values(), *vars(down[0]).values())
    }
    for part, _ in parts:
        for tensor in vars(part).values():
            if tensor is not None:
                whole = wholes.get(tensor.untyped_storage().data_ptr())
                assert whole is None or whole.nbytes == tensor.nbytes


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_shares_of_an_expert_add_up(recipe: Recipe, ranks: int) -> None:
    """Whatever features a rank has: what feeds a feature and what reads it stay together."""
    up, down = projection(recipe, 192, 64), projection(recipe)
    whole = {"up": up[:2], "down": down[:2]}
    x, width, total = torch.randn(3, 64), 192 // ranks, torch.zeros(3, 40)
    for rank in range(ranks):
        parts = shard_expert(whole, "down", rank * width, (rank + 1) * width, keep_bias=rank == 0)
        first, last = (dequantize(*parts[name]) for name in ("up", "down"))
        bias = parts["up"][0].bias
        assert bias is not None
        total += torch.relu(x @ first.T + bias) @ last.T
    expected = torch.relu(x @ up[2].T + up[0].bias) @ down[2].T
    assert (total - expected).norm() / expected.norm() < 1e-5


def test_shares_of_an_expert_have_whole_groups() -> None:
    """Under act-order, cut as they are stored, each share would have some rows of every group."""
    up, down = projection(Recipe(4, 32), 192, 64), projection(Recipe(4, 32))
    parts = shard_expert({"up": up[:2], "down": down[:2]}, "down", 96, 192, keep_bias=False)
    spec = parts["down"][1]
    assert (spec.num_groups, spec.group_size, spec.desc_act) == (3, 32, False)
