"""Programs written for AutoGPTQ quantize with graftq."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.models import logits, relative_error, tiny

from graftq.adapters.auto_gptq.modeling import AutoGPTQForCausalLM
from graftq.adapters.auto_gptq.quantize_config import BaseQuantizeConfig


def examples(padded: bool = False) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(3, 96, (12, 1, 24), generator=torch.Generator().manual_seed(5))
    padding = torch.zeros(1, 4 if padded else 0, dtype=torch.int64)
    return [
        {
            "input_ids": torch.cat((row, padding), 1),
            "attention_mask": torch.cat((torch.ones_like(row), padding), 1),
        }
        for row in ids
    ]


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    tiny("mixtral").save_pretrained(tmp_path / "float")
    return tmp_path / "float"


@pytest.mark.parametrize("static_groups", [False, True])
@pytest.mark.parametrize("desc_act", [False, True])
def test_auto_gptq(plain: Path, tmp_path: Path, desc_act: bool, static_groups: bool):
    config = BaseQuantizeConfig(bits=8, group_size=32, desc_act=desc_act, static_groups=static_groups)
    model = AutoGPTQForCausalLM.from_pretrained(plain, config, torch_dtype=torch.float32)
    expected = logits(model)
    with pytest.raises(ValueError, match="not quantized yet"):
        model.save_quantized(tmp_path / "early")
    model.quantize(examples(), batch_size=2, use_triton=False, cache_examples_on_gpu=True)
    found = logits(model)
    assert relative_error(found, expected) < 0.1
    model.save_quantized(tmp_path / "made")
    again = AutoGPTQForCausalLM.from_quantized(tmp_path / "made", torch_dtype=torch.float32, device="cpu")
    assert torch.equal(logits(again), found)
    stated = json.loads((tmp_path / "made" / "quantize_config.json").read_text())
    assert stated["damp_percent"] == 0.01
    assert stated["desc_act"] == (desc_act and not static_groups)  # as the tensors show it
    with pytest.raises(RuntimeError, match="is quantized"):
        model.quantize(examples())


def test_padding_in_examples_does_not_count(plain: Path):
    config = BaseQuantizeConfig(bits=4, group_size=32)
    found = []
    for padded in (False, True):
        model = AutoGPTQForCausalLM.from_pretrained(plain, config, torch_dtype=torch.float32)
        model.quantize(examples(padded))
        found.append(logits(model))
    assert torch.equal(*found)


def test_what_cannot_be_quantized_with_is_told(plain: Path):
    model = AutoGPTQForCausalLM.from_pretrained(plain, BaseQuantizeConfig(group_size=32), torch_dtype=torch.float32)
    with pytest.raises(ValueError, match="no token in it"):
        model.quantize([])
    with pytest.raises(TypeError, match="no argument 'example'"):
        model.quantize(examples(), example=1)
    assert not model.quantized
