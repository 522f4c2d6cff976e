"""Asks a text-generation-inference server through ``huggingface_hub``."""

import sys

from huggingface_hub import InferenceClient

prompt = "Tell me about AI"
prompt_template = f"""[INST] {prompt} [/INST]
"""

client = InferenceClient(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:3000")
response = client.text_generation(
    prompt_template,
    max_new_tokens=128,
    do_sample=True,
    temperature=0.7,
    top_p=0.95,
    top_k=40,
    repetition_penalty=1.1,
)
print(f"Model output: {response}")
