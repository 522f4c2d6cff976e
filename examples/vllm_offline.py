"""Completes Python code with vLLM's offline engine. Nothing here is graftq's: it only has to be installed beside vLLM.

python examples/vllm_offline.py [CHECKPOINT [TENSOR_PARALLEL_SIZE]]
"""

import sys
from pathlib import Path

from vllm import LLM, SamplingParams

CHECKPOINT = sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).parent / "tiny-mixtral-gptq")
RANKS = int(sys.argv[2]) if len(sys.argv) > 2 else 1
PROMPTS = ["import os\n\n\ndef main(args):\n    ", "class Node:\n    def __init__(self"]

if __name__ == "__main__":  # vLLM's workers import this file
    llm = LLM(CHECKPOINT, tensor_parallel_size=RANKS, max_model_len=256)
    for answer in llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=32)):
        print(f"{answer.prompt}{answer.outputs[0].text}\n{'-' * 40}")
