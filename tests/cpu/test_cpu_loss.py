"""A real model in half precision on a CPU loses nothing that one could measure."""

from __future__ import annotations

import bisect
import inspect
import textwrap
from pathlib import Path

import torch
from support.loading import load
from transformers import AutoTokenizer

from graftq.quant_linear.experts import QuantExperts
from graftq.quant_linear.linear import QuantLinear

CHECKPOINT = Path(__file__).parents[2] / "examples" / "tiny-mixtral-gptq"


def loss(dtype: torch.dtype) -> float:
    """Of the next token, over Python source as the model was trained on."""
    model, tokenizer = load(CHECKPOINT, device_map="cpu", dtype=dtype), AutoTokenizer.from_pretrained(CHECKPOINT)
    assert {str(module).count("kernel=cpu") for module in model.modules() if isinstance(module, QuantLinear)} == {1}
    assert all("kernel=cpu" in str(module) for module in model.modules() if isinstance(module, QuantExperts))
    losses = []
    for module in (textwrap, bisect):
        ids = tokenizer(inspect.getsource(module), return_tensors="pt").input_ids[:, :512]
        with torch.no_grad():
            logits = model(ids).logits[0].float()
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:]).item())
    return sum(losses) / len(losses)


def test_loss_in_half_precision() -> None:
    exact = loss(torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        assert abs(loss(dtype) - exact) < 0.005
