"""Quantizes a small Mixtral, experts included, and completes Python code with what comes out: a minute on a CPU.

The float model is one of 4 bits, dequantized: good enough to show how it is done.
"""

import inspect
import logging
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTQConfig

CHECKPOINT = sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).parent / "tiny-mixtral-gptq")
TEXTS = [inspect.getsource(module)[:10000] for module in (inspect, logging, tempfile, sys.modules["pathlib"])]

tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
with tempfile.TemporaryDirectory() as folder:
    plain = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    plain.dequantize()
    plain.save_pretrained(folder)
    config = GPTQConfig(bits=3, group_size=128, dataset=TEXTS, tokenizer=tokenizer, model_seqlen=512)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)

worst = max(model.quantize_report, key=lambda row: row.error)
print(f"{worst.layer} won least over rounding to the nearest code: {worst.error:.2f} of its error is left")
inputs = tokenizer("import os\n\n\ndef main(args):\n    ", return_tensors="pt", return_token_type_ids=False)
output = model.generate(**inputs, do_sample=False, max_new_tokens=32)
print(tokenizer.decode(output[0], skip_special_tokens=True))

with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)  # a checkpoint like any other
