"""Runs in the SGLang interpreter: one engine, and what it answers, as JSON in a file.

Arguments: a JSON file with ``model``, ``prompts``, ``tokens`` and ``engine``, and the file for the results, which are
not printed, because engines and their workers print whatever they like.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ENGINE = {
    "device": "cpu",
    "dtype": "float32",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "disable_cuda_graph": True,
    "disable_radix_cache": True,
    "disable_overlap_schedule": True,
    "skip_tokenizer_init": True,
    "context_length": 128,
    "max_total_tokens": 512,
    "mem_fraction_static": 0.5,
    "log_level": "warning",
}


def main() -> None:
    import sglang

    order, results = map(Path, sys.argv[1:])
    case = json.loads(order.read_text())
    engine = sglang.Engine(model_path=case["model"], **{**ENGINE, **case["engine"]})
    sampling = {"temperature": 0, "max_new_tokens": case["tokens"], "ignore_eos": True}
    found = engine.generate(input_ids=case["prompts"], sampling_params=sampling, return_logprob=True)
    answers = []
    for answer in found:
        chosen = [step[0] for step in answer["meta_info"]["output_token_logprobs"]]
        answers.append({"tokens": answer["output_ids"], "logprobs": chosen})
    results.write_text(json.dumps(answers))
    engine.shutdown()


if __name__ == "__main__":
    main()
