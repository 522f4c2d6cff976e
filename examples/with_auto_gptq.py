"""A program written for AutoGPTQ, run by graftq: `install()` is the one line more.

With GRAFTQ_AUTO_GPTQ=1 in the environment it would run without that line.
"""

import sys
from pathlib import Path

from transformers import AutoTokenizer

from graftq.adapters.auto_gptq import install

install()

from auto_gptq import AutoGPTQForCausalLM  # noqa: E402

CHECKPOINT = sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).parent / "tiny-mixtral-gptq")

tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT, use_fast=True)
model = AutoGPTQForCausalLM.from_quantized(CHECKPOINT, model_basename="model", use_safetensors=True, device_map="auto")

prompt = "def read(path):\n    with open("
inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
print(tokenizer.decode(model.generate(**inputs, do_sample=False, max_new_tokens=20)[0], skip_special_tokens=True))
print(model.quantize_config)
