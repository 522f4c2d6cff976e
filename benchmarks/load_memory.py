"""Peak resident memory of ``from_pretrained`` on a CPU, against the checkpoint's size.

    python benchmarks/load_memory.py [--layers 4]

Writes a sharded Mixtral of full width (about 0.75 GB a layer), loads it in a process of its own, and
compares the growth of resident memory with the checkpoint's size + one shard + 10 %.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from pathlib import Path

from mixtral_writer import write


def resident() -> int:
    """Resident bytes of this process, pages of mapped files included."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS"))


def measure(folder: str, answers: multiprocessing.SimpleQueue) -> None:  # type: ignore[type-arg]
    import torch
    from harness import sampled_peak
    from transformers import AutoModelForCausalLM
    from transformers.models.mixtral import MixtralForCausalLM

    MixtralForCausalLM.__name__  # noqa: B018 - imported here, so that its own memory is not counted as loading
    start = time.perf_counter()
    with sampled_peak(resident) as peak:
        model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=torch.float16)
    seconds = time.perf_counter() - start
    held = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    answers.put((seconds, held, peak[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    layers = parser.parse_args().layers
    with tempfile.TemporaryDirectory() as folder:
        size = write(Path(folder), layers=layers, shards=layers)
        shard = max(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        context = multiprocessing.get_context("spawn")
        answers = context.SimpleQueue()
        process = context.Process(target=measure, args=(folder, answers))
        process.start()
        seconds, held, growth = answers.get()
        process.join()
    bound = size + shard + 0.1 * size
    for what, value in (("checkpoint", size), ("largest shard", shard), ("parameters held", held), ("peak", growth)):
        print(f"{what:16} {value / 1e9:6.2f} GB")
    print(f"{'bound':16} {bound / 1e9:6.2f} GB: {'kept' if growth <= bound else 'EXCEEDED'}")
    print(f"{'loading':16} {seconds:6.2f} s, {size / 1e9 / seconds:.2f} GB/s")


if __name__ == "__main__":
    main()
