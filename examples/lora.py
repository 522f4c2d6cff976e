"""Trains LoRA adapters on a packed GPTQ model, attention and experts, and merges them into its float model.

Needs PEFT: pip install peft
"""

import sys
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

CHECKPOINT = sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).parent / "tiny-mixtral-gptq")

tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
base = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32, device_map="auto")
config = LoraConfig(
    r=8,
    lora_alpha=16,
    target_modules=["q_proj", "v_proj"],
    target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    task_type="CAUSAL_LM",
)
model = get_peft_model(base, config)

batch = tokenizer(Path(__file__).read_text(), return_tensors="pt").input_ids[:, :128].to(base.device)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
for step in range(4):
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.3f}")

with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    again = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32, device_map="auto")
    merged = PeftModel.from_pretrained(again.dequantize(), folder).merge_and_unload()
with torch.no_grad():
    print(f"merged: loss {merged(input_ids=batch, labels=batch).loss.item():.3f}")
