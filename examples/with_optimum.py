"""optimum's way to load a GPTQ checkpoint; needs `pip install optimum`, and no GPTQModel. Nothing here is graftq's."""

import sys
from pathlib import Path

from accelerate import init_empty_weights
from optimum.gptq import load_quantized_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

CHECKPOINT = sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).parent / "tiny-mixtral-gptq")

with init_empty_weights():
    empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(CHECKPOINT))
empty.tie_weights()
model = load_quantized_model(empty, save_folder=CHECKPOINT, device_map="auto")

tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
prompt = "def read(path):\n    with open("
inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
print(tokenizer.decode(model.generate(**inputs, do_sample=False, max_new_tokens=20)[0], skip_special_tokens=True))
