"""Every architecture, in the names that the Hub and the quantizers use, against its float twin."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.checkpoints import EXPERT_STYLES, write_pair
from support.gptq import Recipe
from support.loading import assert_right
from support.models import DENSE, EXPERTS, tiny

GPTQMODEL_NAMES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


@pytest.mark.parametrize("name", DENSE)
def test_dense(name: str, tmp_path: Path) -> None:
    assert_right(write_pair(tmp_path, tiny(name), Recipe()))


@pytest.mark.parametrize("name", EXPERTS)
def test_experts(name: str, tmp_path: Path) -> None:
    assert_right(write_pair(tmp_path, tiny(name), Recipe()))


def test_mixtral_in_gptqmodel_names(tmp_path: Path) -> None:
    renamed = (r"block_sparse_moe\.experts\.(\d+)\.(w\d)", lambda m: f"mlp.experts.{m[1]}.{GPTQMODEL_NAMES[m[2]]}")
    assert_right(write_pair(tmp_path, tiny("mixtral"), Recipe(), rename=renamed))


@pytest.mark.parametrize("fused_bias", [True, False], ids=["fused bias", "bias per expert"])
@pytest.mark.parametrize("style", EXPERT_STYLES)
def test_gpt_oss_names(style: str, fused_bias: bool, tmp_path: Path) -> None:
    assert_right(write_pair(tmp_path, tiny("gpt_oss"), Recipe(), expert_style=style, fused_bias=fused_bias))


def test_gpt_oss_with_gate_and_up_apart(tmp_path: Path) -> None:
    """GPTQModel 7 stores gate and up apart, where the model interleaves them."""
    assert_right(write_pair(tmp_path, tiny("gpt_oss"), Recipe(), split_gate_up=True))


def test_experts_may_differ_in_bits_group_and_order(tmp_path: Path) -> None:
    def own(module: str) -> Recipe | None:
        if ".experts.1." in module:
            return Recipe(bits=8, group_size=16)
        return Recipe(bits=2, desc_act=False) if module.endswith("w3") else Recipe(group_size=-1)

    checkpoint = write_pair(tmp_path, tiny("mixtral"), Recipe(), overrides=own, dynamic=DIFFERENT)
    assert_right(checkpoint)


DIFFERENT = {
    r".*\.experts\.1\..*": {"bits": 8, "group_size": 16},
    r"+:.*w3$": {"bits": 2, "group_size": 32, "desc_act": False},
    r".*": {"group_size": -1},
}


def test_base_model_without_its_head(tmp_path: Path) -> None:
    from transformers import AutoModel

    checkpoint = write_pair(tmp_path, tiny("llama"), Recipe())
    whole = assert_right(checkpoint)
    base = AutoModel.from_pretrained(checkpoint, dtype=whole.dtype)
    stored = [model.layers[0].mlp.up_proj.checkpoint_tensors().qweight for model in (base, whole.model)]
    assert stored[0].equal(stored[1])


@pytest.mark.parametrize("part", ["self_attn", "experts", "layers.1."], ids=["attention", "experts", "one layer"])
@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_partly_quantized(name: str, part: str, tmp_path: Path) -> None:
    overrides = {True: Recipe(), False: None}
    assert_right(write_pair(tmp_path, tiny(name), Recipe(), overrides=lambda module: overrides[part in module]))


def test_a_new_head_may_be_initialized(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    checkpoint = write_pair(tmp_path, tiny("llama"), Recipe())
    model, info = AutoModelForSequenceClassification.from_pretrained(checkpoint, output_loading_info=True)
    assert info["missing_keys"] == {"score.weight"}
    assert not model.model.layers[0].mlp.up_proj.checkpoint_tensors().qweight.is_meta
