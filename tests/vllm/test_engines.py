"""Real vLLM engines on the CPU against float twins, in float32."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.checkpoints import edit, edit_config
from support.gptq import Recipe
from support.vllm_cases import Case, copied, damaged, mixed, pair, with_adapter

ROOT = Path(__file__).parents[2]
TWO, STAGES = {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}
BY_NAME = {"quantization": "graftq"}
NO_ATTENTION: dict[str, dict[str, Any]] = {"-:.*self_attn.*": {}}
LLAMA, MIXTRAL = pair("llama", Recipe(zero_bias=True)), pair("mixtral", Recipe(zero_bias=True))


def _all_but(part: str) -> Callable[[str], Recipe | None]:
    return lambda module: None if part in module else Recipe()


HEAD = r"(proj|lm_head)$"
FALCON = r"(query_key_value|dense\w*)$"
SHARED_EXPERT = {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
REAL = copied(ROOT / "examples" / "tiny-mixtral-gptq")
TRUTH = ROOT / "tests" / "data" / "tiny-mixtral-truth.npz"

GRID = [
    Case(f"{name}-{bits}bit-{group}g", "eager", mixed(name, bits, group))
    for name in ("llama", "mixtral")
    for bits in (2, 3, 4, 8)
    for group in (-1, 32, 128)
]
KINDS = [
    Case("trained Mixtral", "eager", REAL, truth=TRUTH),
    Case("v2, 3 bits", "eager", pair("llama", Recipe(3, sym=False, checkpoint_format="gptq_v2"))),
    Case("v2, 4 bits", "eager", pair("llama", Recipe(4, sym=False, checkpoint_format="gptq_v2"))),
    Case("quantized head", "eager", pair("llama", Recipe(3), only=HEAD)),
    Case("sharded files", "eager", pair("mixtral", Recipe(zero_bias=True), layout="sharded")),
    Case("only quantize_config.json", "eager", pair("llama", Recipe(), layout="AutoGPTQ's"), BY_NAME),
    Case("plain attention", "eager", pair("mixtral", Recipe(), overrides=_all_but("self_attn"), dynamic=NO_ATTENTION)),
    Case("plain experts", "eager", pair("mixtral", Recipe(), overrides=_all_but("experts"))),
    Case("biases", "eager", pair("qwen2", Recipe(sym=False))),
    Case("fused in the files", "eager", pair("phi3", Recipe(3))),
    Case("reordered by vLLM", "eager", pair("falcon", Recipe(3), only=FALCON, sizes={"head_dim": None})),
    Case("shared experts", "eager", pair("qwen2_moe", Recipe(4), sizes=SHARED_EXPERT)),
    Case("Conv1D", "eager", pair("gpt2", Recipe(), sizes={"n_embd": 128})),
    Case("Qwen3-MoE", "eager", pair("qwen3_moe", Recipe(3), sizes={"moe_intermediate_size": 64})),
    Case("transformers' Llama", "eager", LLAMA, {"model_impl": "transformers"}),
    Case("transformers' Mixtral", "eager", MIXTRAL, {"model_impl": "transformers"}),
    Case("LoRA", "eager", with_adapter(LLAMA), {"enable_lora": True, "max_lora_rank": 8}, lora=True),
    Case("multiprocess", "multiprocess", MIXTRAL),
    Case("compiled Llama", "compiled", mixed("llama", 3, 32)),
    Case("compiled Mixtral", "compiled", MIXTRAL),
]
SHARED_HEAD = {"num_key_value_heads": 1, "vocab_size": 330}
RANKS = [
    Case("trained Mixtral on two ranks", "two ranks", REAL, TWO, truth=TRUTH),
    Case("llama-3bit-128g on two ranks", "two ranks", mixed("llama", 3, 128), TWO),
    Case("llama-4bit-32g on two ranks", "two ranks", mixed("llama", 4, 32), TWO),
    Case("mixtral-3bit-128g on two ranks", "two ranks", mixed("mixtral", 3, 128), TWO),
    Case("mixtral-8bit on two ranks", "two ranks", mixed("mixtral", 8, -1), TWO),
    Case("two ranks share a head", "two ranks", pair("llama", Recipe(3), only=HEAD, sizes=SHARED_HEAD), TWO),
    Case("fused in the files, on two ranks", "two ranks", pair("phi3", Recipe(4)), TWO),
    Case("expert parallel", "two ranks", pair("mixtral", Recipe(3)), {**TWO, "enable_expert_parallel": True}),
    Case("trained Mixtral in two stages", "two stages", REAL, STAGES, truth=TRUTH),
    Case("quantized head in two stages", "two stages", pair("llama", Recipe(3), only=HEAD), STAGES),
]


def _lose(ending: str) -> Callable[[Path], None]:
    def change(state: dict[str, Any]) -> None:
        del state[next(name for name in sorted(state) if name.endswith(ending))]

    return lambda checkpoint: edit(checkpoint, change)


def _fill(ending: str, value: int) -> Callable[[Path], None]:
    def change(state: dict[str, Any]) -> None:
        state[next(name for name in sorted(state) if name.endswith(ending))].fill_(value)

    return lambda checkpoint: edit(checkpoint, change)


DAMAGED = [
    ("missing expert's tensor", MIXTRAL, _lose("experts.2.w2.scales"), r"experts\.2\.w2: scales missing"),
    ("missing tensor", LLAMA, _lose("layers.0.self_attn.k_proj.qzeros"), "layers.0.self_attn.k_proj: qzeros missing"),
    ("missing g_idx", LLAMA, _lose("o_proj.g_idx"), "o_proj: desc_act is true but g_idx is missing"),
    ("g_idx out of range", LLAMA, _fill("q_proj.g_idx", 99), "q_proj.g_idx: group 99 out of range"),
    ("bias where the model has none", LLAMA, _fill("up_proj.bias", 1), "up_proj.bias: non-zero bias"),
    ("expert's bias", MIXTRAL, _fill("experts.1.w3.bias", 1), r"experts\.1\.w3\.bias: non-zero bias"),
    ("wrong label", LLAMA, lambda path: edit_config(path, checkpoint_format="gptq_v2"), "labeled gptq_v2, but"),
    ("wrong bits", LLAMA, lambda path: edit_config(path, bits=8), "says 8 bits, but qweight has .*show 4"),
]
ERRORS = [Case(name, "eager", damaged(build, damage), error=said) for name, build, damage, said in DAMAGED]


@pytest.mark.parametrize("case", [*GRID, *KINDS, *RANKS], ids=str)
def test_answers_as_the_float_twin(case: Case, outcome: Callable[[Case], Any]) -> None:
    order, found = outcome(case)
    assert "error" not in found, found["error"]
    assert found["method"] == "graftq"
    for answer, expected in zip(found["answers"], order["expected"], strict=True):
        assert answer["tokens"] == expected["tokens"]
        if "logprobs" in expected:
            np.testing.assert_allclose(answer["logprobs"], expected["logprobs"], rtol=0, atol=1e-3)


@pytest.mark.parametrize("case", ERRORS, ids=str)
def test_says_what_is_wrong(case: Case, outcome: Callable[[Case], Any]) -> None:
    order, found = outcome(case)
    assert re.search(case.error, found.get("error", "")), found
    assert order["model"] in found["error"]
