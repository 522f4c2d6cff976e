"""Completes Python code with a real GPTQ checkpoint: a small Mixtral, trained on Python source, quantized by AutoGPTQ.

Nothing here is graftq's: the plain transformers call is all there is.
"""

import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

CHECKPOINT = sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).parent / "tiny-mixtral-gptq")
PROMPT = "import os\n\n\ndef main(args):\n    "

tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, device_map="auto", trust_remote_code=False, revision="main")

inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False).to(model.device)
start = time.perf_counter()
with torch.no_grad():
    output = model.generate(**inputs, do_sample=False, max_new_tokens=64)
seconds = time.perf_counter() - start

new = output.shape[1] - inputs["input_ids"].shape[1]
print(tokenizer.decode(output[0], skip_special_tokens=True))
print(f"\n{new} tokens in {seconds:.1f} s on {model.device}: {new / seconds:.1f} tokens/s")
