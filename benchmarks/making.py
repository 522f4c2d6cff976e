"""Quality of the checkpoints that graftq makes: distance to the float model on held-out text.

    python benchmarks/making.py MODEL --calibrate '/usr/lib/python3*/[a-m]*.py' --held-out 'SITE/torch/nn/*.py' \
        --make 4:128 3:128:high --compare CHECKPOINT ...

MODEL is a float one, or a checkpoint of 8 bits, which is then dequantized first. Prints mean KL(float || quantized) in
nats per token and the mean loss, for the float model, for what is made (bits:group[:effort]) and for checkpoints made
elsewhere.
"""

from __future__ import annotations

import argparse
import glob
import random
import time
from pathlib import Path
from typing import Any

import torch
import transformers.modeling_utils  # noqa: F401 - graftq takes over first
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from graftq.adapters.transformers.making.calibration import token_rows
from graftq.adapters.transformers.making.model import quantize_model
from graftq.adapters.transformers.making.options import Options

LENGTH = 512


def rows_of(pattern: str, tokenizer: Any, tokens: int, seed: int) -> list[torch.Tensor]:
    files = sorted(path for part in pattern.split(",") for path in glob.glob(part))
    random.Random(seed).shuffle(files)
    texts = (Path(file).read_text(encoding="utf-8", errors="ignore")[:6000] for file in files)
    return token_rows(texts, tokenizer, LENGTH, tokens)


@torch.no_grad()
def measure(model: Any, rows: list[torch.Tensor], truth: list[torch.Tensor] | None) -> tuple[float, float, Any]:
    logs, kl, loss, count = [], 0.0, 0.0, 0
    for number, row in enumerate(rows):
        if len(row) < 2:
            continue
        log = model(row[None]).logits[0, :-1].float().log_softmax(-1)
        loss -= float(log.gather(1, row[1:, None]).sum())
        count += len(row) - 1
        if truth is None:
            logs.append(log.half())
        else:
            true = truth[number].float()
            kl += float((true.exp() * (true - log)).sum())
    return kl / count, loss / count, logs


def load_float(path: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    if getattr(model.config, "quantization_config", None) is not None:
        model.dequantize()
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibrate", required=True, help="comma-separated patterns of text files")
    parser.add_argument("--held-out", required=True, help="likewise")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--held-out-tokens", type=int, default=24576)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--make", nargs="*", default=["4:128"], help="bits:group[:effort[:act]]")
    parser.add_argument("--compare", nargs="*", default=[])
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    held_out = [row for row in rows_of(arguments.held_out, tokenizer, arguments.held_out_tokens, 7) if len(row) > 1]
    _, loss, truth = measure(load_float(arguments.model), held_out, None)
    print("| made by | KL | loss | seconds |\n| --- | --- | --- | --- |")
    print(f"| float | | {loss:.4f} | |", flush=True)
    for path in arguments.compare:
        kl, loss, _ = measure(load_float(path), held_out, truth)
        print(f"| {Path(path).name} | {kl:.4f} | {loss:.4f} | |", flush=True)
    for seed in arguments.seeds:
        calibration = rows_of(arguments.calibrate, tokenizer, arguments.tokens, seed)
        for text in arguments.make:
            bits, group, effort, order = (text.split(":") + ["normal", "static"][text.count(":") - 1 :])[:4]
            options = Options(int(bits), int(group), effort=effort, desc_act=order == "act")
            model = load_float(arguments.model)
            start = time.perf_counter()
            quantize_model(model, calibration, options)
            spent = time.perf_counter() - start
            kl, loss, _ = measure(model, held_out, truth)
            print(f"| graftq {text}, seed {seed} | {kl:.4f} | {loss:.4f} | {spent:.0f} |", flush=True)


if __name__ == "__main__":
    main()
