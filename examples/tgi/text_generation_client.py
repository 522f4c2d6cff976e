"""Asks a text-generation-inference server through the ``text-generation`` package."""

import sys

from text_generation import Client

prompt = "Write a story about llamas"
prompt_template = f"""[INST] {prompt} [/INST]
"""

client = Client(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:3000", timeout=120)
response = client.generate(
    prompt_template,
    max_new_tokens=512,
    do_sample=True,
    temperature=0.7,
    top_p=0.95,
    top_k=40,
    repetition_penalty=1.1,
)
print(f"Model output: {response.generated_text}")
