"""Runs in the vLLM interpreter: one engine after another, a JSON line of results for each.

Arguments: a JSON file with the orders that ``support.vllm_cases`` writes, and the file for the results. These are not
printed, because engines and their workers print whatever they like.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 128,
    "max_num_seqs": 4,
    "skip_tokenizer_init": True,
    "disable_log_stats": True,
}


def run(case: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(case["model"], **{**ENGINE, **case["engine"]})
    sampling = SamplingParams(temperature=0, max_tokens=case["tokens"], ignore_eos=True, detokenize=False, logprobs=0)
    lora = LoRARequest("adapter", 1, case["lora"]) if case.get("lora") else None
    prompts = [{"prompt_token_ids": prompt} for prompt in case["prompts"]]
    answers = []
    for answer in llm.generate(prompts, sampling, lora_request=lora, use_tqdm=False):
        tokens, steps = answer.outputs[0].token_ids, answer.outputs[0].logprobs
        chosen = [step[token].logprob for token, step in zip(tokens, steps, strict=True)]
        answers.append({"tokens": list(tokens), "logprobs": chosen})
    return {"answers": answers, "method": llm.llm_engine.model_config.quantization}


def clean() -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()


def main() -> None:
    orders, results = map(Path, sys.argv[1:])
    for case in json.loads(orders.read_text()):
        started = time.perf_counter()
        try:
            outcome = run(case)
        except Exception as error:
            outcome = {"error": f"{type(error).__name__}: {error}"}
        clean()
        seconds = round(time.perf_counter() - started, 1)
        with results.open("a") as stream:
            stream.write(json.dumps({"id": case["id"], "seconds": seconds, **outcome}) + "\n")


if __name__ == "__main__":
    main()
