"""Turns a GPTQ model into the plain float model that it stands for, and saves that as an ordinary checkpoint."""

import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

CHECKPOINT = sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).parent / "tiny-mixtral-gptq")

model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, device_map="auto")
packed = model.get_memory_footprint()
model.dequantize(dtype=torch.float16)
print(f"{packed / 1e6:.1f} MB packed, {model.get_memory_footprint() / 1e6:.1f} MB in {model.dtype}")
print(model.model.layers[0])

with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)  # loads anywhere, without graftq
