"""Real SGLang engines on the CPU against float twins, in float32."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.checkpoints import edit
from support.gptq import Recipe
from support.vllm_cases import NEW_TOKENS, PROMPTS, ask_twin, copied, mixed, pair, read_truth

ROOT = Path(__file__).parents[2]
HEAD = r"(proj|lm_head)$"
TWO = {"tp_size": 2}
REAL = copied(ROOT / "examples" / "tiny-mixtral-gptq")
TRUTH = ROOT / "tests" / "data" / "tiny-mixtral-truth.npz"


@dataclass(frozen=True)
class Case:
    """One engine to start.

    Attributes:
        id: Its name.
        build: Writes the checkpoint into an empty folder and returns its path; ``float`` lies beside it.
        engine: Arguments of ``sglang.Engine``.
        truth: Prompts and greedy tokens in a file, instead of a float twin.
    """

    id: str
    build: Callable[[Path], Path]
    engine: Mapping[str, Any] = field(default_factory=dict)
    truth: Path | None = None


CASES = [
    Case("trained Mixtral", REAL, truth=TRUTH),
    Case("Llama, 3 bits, act-order, asymmetric", pair("llama", Recipe(3, 128, sym=False))),
    Case("Llama, dynamic", mixed("llama", 4, 32)),
    Case("Llama, 2 bits, v2", pair("llama", Recipe(2, sym=False, checkpoint_format="gptq_v2"))),
    Case("Qwen2, biases", pair("qwen2", Recipe(sym=False))),
    Case("Phi-3, fused in the files", pair("phi3", Recipe(3))),
    Case("Mixtral, 4 bits, asymmetric", pair("mixtral", Recipe(4, 64, sym=False))),
    Case("Qwen3-MoE", pair("qwen3_moe", Recipe(3), sizes={"moe_intermediate_size": 64})),
    Case("only quantize_config.json", pair("llama", Recipe(), layout="AutoGPTQ's"), {"quantization": "graftq"}),
    Case("quantized head", pair("llama", Recipe(3), only=HEAD)),
    Case("Llama on two ranks", pair("llama", Recipe(3, 128)), TWO),
    Case("Mixtral on two ranks", pair("mixtral", Recipe(4, 64, sym=False)), TWO),
    Case("experts on two ranks", pair("mixtral", Recipe(3)), {**TWO, "ep_size": 2}),
]


def serve(
    python: str, checkpoint: Path, prompts: list[list[int]], engine: Mapping[str, Any], **environment: str
) -> tuple[list[dict[str, Any]] | None, str]:
    """What an engine answers, or None if there is no answer; and what was printed."""
    order, results = checkpoint.parent / "order.json", checkpoint.parent / "results.json"
    order.write_text(
        json.dumps({"model": str(checkpoint), "prompts": prompts, "tokens": NEW_TOKENS, "engine": dict(engine)})
    )
    if "tp_size" in engine:
        environment["SGLANG_CPU_OMP_THREADS_BIND"] = "0|1"
    command = [python, str(Path(__file__).parent / "run_engine.py"), str(order), str(results)]
    done = subprocess.run(
        command,
        env={**os.environ, **environment},
        cwd=checkpoint.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    return json.loads(results.read_text()) if results.exists() else None, done.stdout[-20000:]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_answers_as_the_float_twin(case: Case, interpreter: str, cpu_engine: dict[str, str], tmp_path: Path) -> None:
    checkpoint = case.build(tmp_path)
    prompts, expected = read_truth(case.truth) if case.truth else (PROMPTS, ask_twin(tmp_path / "float"))
    answers, said = serve(interpreter, checkpoint, prompts, case.engine, **cpu_engine)
    assert answers is not None, said
    for answer, twin in zip(answers, expected, strict=True):
        assert answer["tokens"] == twin["tokens"]
        if "logprobs" in twin:
            np.testing.assert_allclose(answer["logprobs"], twin["logprobs"], rtol=0, atol=1e-3)


def test_damage_is_named(interpreter: str, cpu_engine: dict[str, str], tmp_path: Path) -> None:
    checkpoint = pair("mixtral", Recipe())(tmp_path)
    edit(checkpoint, lambda state: state.__delitem__(next(name for name in state if name.endswith("2.w2.scales"))))
    answers, said = serve(interpreter, checkpoint, PROMPTS, {}, **cpu_engine)
    assert answers is None
    assert "experts.2.w2: scales missing" in said


def test_padding_for_ranks_is_refused(interpreter: str, cpu_engine: dict[str, str], tmp_path: Path) -> None:
    """On CPUs SGLang gives a model of one key and value head two, for two ranks; packed tensors do not have them."""
    checkpoint = pair("llama", Recipe(), sizes={"num_key_value_heads": 1})(tmp_path)
    answers, said = serve(interpreter, checkpoint, PROMPTS, TWO, **cpu_engine)
    assert answers is None
    assert "self_attn.k_proj: qweight has 32 columns, the layer 64 outputs" in said


def test_a_head_that_the_model_keeps_plain_is_refused(
    interpreter: str, cpu_engine: dict[str, str], tmp_path: Path
) -> None:
    checkpoint = pair("mixtral", Recipe(), only=r"(w[123]|proj|lm_head)$")(tmp_path)
    answers, said = serve(interpreter, checkpoint, PROMPTS, {}, **cpu_engine)
    assert answers is None
    assert "lm_head: packed, but SGLang's MixtralForCausalLM keeps lm_head unquantized" in said
