"""PEFT's adapters on AutoGPTQ's object and on the model inside: those of the one are not silently lost on the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.checkpoints import write_pair
from support.gptq import Recipe
from support.models import logits, relative_error, tiny

pytestmark = [
    pytest.mark.usefixtures("auto_gptq_asked_for"),
    pytest.mark.filterwarnings(r"ignore:`\w*gradient_checkpointing\w*` is deprecated"),
    pytest.mark.filterwarnings("ignore:Found missing adapter keys"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_pair(tmp_path, tiny("llama", num_hidden_layers=1), Recipe())


def quantized(folder: Path) -> Any:
    from auto_gptq import AutoGPTQForCausalLM

    return AutoGPTQForCausalLM.from_quantized(str(folder), device="cpu", torch_dtype=torch.float32)


def trained(model: Any, folder: Path) -> torch.Tensor:
    """Save an adapter that does something; what the model says with it."""
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    adapted.save_pretrained(folder)
    return logits(adapted)


def test_made_on_the_model_inside(folder: Path, tmp_path: Path) -> None:
    wanted = trained(quantized(folder).model, tmp_path / "adapter")
    found = PeftModel.from_pretrained(quantized(folder).model, tmp_path / "adapter")
    assert relative_error(logits(found), wanted) < 1e-6
    with pytest.raises(ValueError, match=r"use `.model`: PeftModel"):
        PeftModel.from_pretrained(quantized(folder), tmp_path / "adapter")
    other = get_peft_model(quantized(folder), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"use `.model`: PeftModel"):
        other.load_adapter(str(tmp_path / "adapter"), "second")
    whole = quantized(folder)
    whole.load_adapter(str(tmp_path / "adapter"))  # transformers' own, which is the model's
    assert relative_error(logits(whole), wanted) < 1e-6


def test_made_on_the_object(folder: Path, tmp_path: Path) -> None:
    wanted = trained(quantized(folder), tmp_path / "adapter")
    found = PeftModel.from_pretrained(quantized(folder), tmp_path / "adapter")
    assert relative_error(logits(found), wanted) < 1e-6
    with pytest.raises(ValueError, match=r"put it on that, not on its `.model`"):
        PeftModel.from_pretrained(quantized(folder).model, tmp_path / "adapter")
