"""Completes Python code with a GPTQ model whose layers are spread over several processes.

torchrun --nproc-per-node 2 examples/tensor_parallel.py
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.distributed import DistributedConfig

CHECKPOINT = sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).parent / "tiny-mixtral-gptq")

tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
distributed = DistributedConfig(tp_size=int(os.environ["WORLD_SIZE"]), tp_plan="auto")
model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32, distributed_config=distributed)
inputs = tokenizer("import os\n\n\ndef main(args):\n    ", return_tensors="pt", return_token_type_ids=False)
with torch.no_grad():
    output = model.generate(**inputs.to(model.device), do_sample=False, max_new_tokens=16)
if dist.get_rank() == 0:
    print(tokenizer.decode(output[0], skip_special_tokens=True))
    print(
        f"{dist.get_world_size()} processes; this one has of a layer's output: {model.model.layers[0].self_attn.o_proj}"
    )
dist.destroy_process_group()
