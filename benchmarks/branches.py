"""Every branch of TheBloke/Mixtral-8x7B-Instruct-v0.1-GPTQ at full size: written, loaded by the plain call, generating.

    python benchmarks/branches.py FOLDER [BRANCH ...]

FOLDER needs room for one branch, 48 GB at most; they are written one after the other, and removed.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

from mixtral_writer import BRANCHES

HUB_GB = dict(zip(BRANCHES, (23.81, 24.70, 27.42, 18.01, 18.85, 47.04, 48.10), strict=True))
"""What the branches on the Hub take, by its model card."""

_LOAD = """
import sys, time, torch
from transformers import AutoModelForCausalLM
torch.zeros(1, device="cuda")
started = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], device_map="cuda")
torch.cuda.synchronize()
seconds = time.perf_counter() - started
held = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
peak = torch.cuda.max_memory_allocated()
prompt = torch.randint(3, 32000, (1, 128), device="cuda")
logits = model(prompt).logits
assert torch.isfinite(logits).all()
mask = torch.ones_like(prompt)
tokens = model.generate(prompt, attention_mask=mask, max_new_tokens=16, do_sample=False, pad_token_id=0)
distinct = tokens[0, 128:].unique().numel()
print(f"{seconds:.1f} s | {peak / 1e9:.2f} GB | {peak / held:.3f} | {distinct} of {tokens.shape[1] - 128}")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("branches", nargs="*", default=list(BRANCHES))
    options = parser.parse_args()
    print("| branch | on the Hub, GB | written, GB | loaded in | GPU peak | of what is held | distinct new tokens |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    writer = Path(__file__).with_name("mixtral_writer.py")
    for branch in options.branches:
        folder = options.folder / branch
        subprocess.run([sys.executable, writer, folder, "--branch", branch], check=True, stdout=subprocess.DEVNULL)
        written = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e9
        started = time.perf_counter()
        said = subprocess.run([sys.executable, "-c", _LOAD, folder], check=False, stdout=subprocess.PIPE, text=True)
        outcome = said.stdout.strip() or f"failed after {time.perf_counter() - started:.0f} s | | |"
        print(f"| {branch} | {HUB_GB[branch]} | {written:.2f} | {outcome} |", flush=True)
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
