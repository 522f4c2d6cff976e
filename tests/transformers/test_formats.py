"""Widths, groups, orders, symmetries and formats, through the whole loading path."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.checkpoints import write_pair
from support.gptq import Recipe
from support.loading import assert_right
from support.models import tiny

RECIPES = [
    Recipe(bits, group_size, desc_act, sym)
    for bits in (2, 3, 4, 8)
    for group_size in (-1, 16, 32)
    for desc_act, sym in ((True, True), (False, True), (True, False))
]


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_grid(name: str, recipe: Recipe, tmp_path: Path) -> None:
    assert_right(write_pair(tmp_path, tiny(name, num_hidden_layers=1), recipe))


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_v2(bits: int, sym: bool, tmp_path: Path) -> None:
    assert_right(write_pair(tmp_path, tiny("llama"), Recipe(bits, sym=sym, checkpoint_format="gptq_v2")))


@pytest.mark.parametrize("scales", [torch.bfloat16, torch.float32], ids=str)
def test_scales(scales: torch.dtype, tmp_path: Path) -> None:
    model = assert_right(write_pair(tmp_path, tiny("llama"), Recipe(scales=scales)))
    assert model.model.layers[0].mlp.up_proj.scales.dtype == scales


@pytest.mark.parametrize("group_size", [48, 128, 1024])
def test_group_that_does_not_divide_or_exceeds_k(group_size: int, tmp_path: Path) -> None:
    assert_right(write_pair(tmp_path, tiny("llama"), Recipe(group_size=group_size)))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_ragged_widths(bits: int, tmp_path: Path) -> None:
    model = tiny("llama", hidden_size=40, intermediate_size=104, head_dim=16)
    assert_right(write_pair(tmp_path, model, Recipe(bits, group_size=32)))


@pytest.mark.parametrize("layout", ["TheBloke's", "AutoGPTQ's", "sharded", "config.json alone"])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_layouts(name: str, layout: str, tmp_path: Path) -> None:
    assert_right(write_pair(tmp_path, tiny(name), Recipe(zero_bias=True), layout=layout))
