"""Saves a GPTQ model that transformers has loaded, and loads what was saved: packed as it was, tensor by tensor."""

import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

CHECKPOINT = sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).parent / "tiny-mixtral-gptq")

model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, device_map="auto")
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)  # names and layout of the checkpoint, whatever kernels have made of its weights
    print(*sorted(path.name for path in Path(folder).iterdir()), sep="\n")
    again = AutoModelForCausalLM.from_pretrained(folder, device_map="auto")

ids = torch.arange(5, 25, device=model.device)[None]
with torch.no_grad():
    print("logits:", "the same" if again(ids).logits.equal(model(ids).logits) else "different")
