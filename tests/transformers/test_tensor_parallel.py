"""Two processes that share a model compute what one computes, forwards and backwards."""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import Any

import pytest
import torch
from support.checkpoints import write_pair
from support.gptq import Recipe
from support.models import tiny
from support.processes import TESTS, run_ranks

pytestmark = pytest.mark.skipif(
    not hasattr(torch.compiler, "is_exporting"), reason="transformers' tensor parallelism needs a torch newer than 2.6"
)

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, act-order": ("llama", {}),
    "llama, 3 bits in one group": ("llama", {"recipe": Recipe(bits=3, group_size=-1, desc_act=False)}),
    "llama with its head": ("llama", {"only": "(proj|lm_head)$"}),
    "qwen2, biases": ("qwen2", {}),
    "phi3, projections in one": ("phi3", {}),
    "mixtral": ("mixtral", {}),
    "mixtral, a plan of the caller": ("mixtral", {}),
    "mixtral, one layer in float": ("mixtral", {"overrides": lambda m: Recipe() if "layers.1." in m else None}),
    "deepseek_v3": ("deepseek_v3", {}),
    "gpt_oss, biases of experts": ("gpt_oss", {}),
    "gpt_oss, biases of experts in one": ("gpt_oss", {"fused_bias": True}),
}
OWN_PLANS = version("transformers") != "5.16.0"  # which leaves a plan of the caller out
if not OWN_PLANS:
    MODELS = {what: (name, arguments) for what, (name, arguments) in MODELS.items() if name != "gpt_oss"}

PLANS = {
    "mixtral, a plan of the caller": "compare by a plan of experts",
    "gpt_oss": "compare by a plan of experts and output",  # its own plan shards none of them
}
REFUSALS = {
    "save": "distributed over processes cannot be saved",
    "dequantize": "distributed over processes cannot be dequantized",
    "packed_colwise": r"mlp.up_proj is packed, and cannot be sharded by 'packed_colwise'",
}


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One pair of processes for all: importing takes longer than anything that they do."""
    tasks = {}
    for name, (model, arguments) in MODELS.items():
        folder = tmp_path_factory.mktemp("ranks")
        deed = PLANS.get(model if model == "gpt_oss" else name, "compare")
        tasks[name] = (deed, str(write_pair(folder, tiny(model), **{"recipe": Recipe(), **arguments})))
    tasks |= {deed: (deed, tasks["llama, act-order"][1]) for deed in REFUSALS}
    file = tmp_path_factory.mktemp("tasks") / "tasks.json"
    file.write_text(json.dumps(tasks))
    out = run_ranks(TESTS / "support" / "ranks.py", str(file))
    return json.loads(next(line for line in out.splitlines() if line.startswith("FOUND")).removeprefix("FOUND"))


@pytest.mark.parametrize("what", MODELS)
def test_as_one_process(what: str, findings: dict[str, Any]) -> None:
    found = findings[what]
    assert found["logits"] < 1e-5
    assert found["gradients"] < 1e-4
    assert found["share"] == pytest.approx(0.5, abs=0.25)  # what the plan leaves whole counts too


@pytest.mark.parametrize("what", REFUSALS)
def test_refused_by_name(what: str, findings: dict[str, Any]) -> None:
    if what == "packed_colwise" and not OWN_PLANS:
        pytest.skip("transformers 5.16.0 follows no plan but the model's own")
    assert REFUSALS[what] in findings[what]


def test_example(findings: dict[str, Any]) -> None:
    assert "def main(args):" in findings["example"]
    assert "QuantLinear(128, 256" in findings["example"]
