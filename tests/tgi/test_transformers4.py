"""The transformers that the server pins, without the server: logits of packed models against their float twins."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.checkpoints import edit, write_pair
from support.gptq import Recipe
from support.models import tiny
from support.processes import ROOT, evaluate
from support.tgi import INTERPRETER

pytestmark = pytest.mark.skipif(not INTERPRETER, reason="GRAFTQ_TEST_TGI names no interpreter (see tests/tgi/prepare)")

COMPARE = """
import json, sys, torch
from support.models import logits, relative_error
from transformers import AutoModelForCausalLM, LlamaForCausalLM

def load(path, by=AutoModelForCausalLM, dtype=torch.float32):
    return by.from_pretrained(path, torch_dtype=dtype)

for name, pair, direct in json.loads({cases!r}):
    by = LlamaForCausalLM if direct else AutoModelForCausalLM
    model = load(pair + "/gptq", by)
    print(name, relative_error(logits(model), logits(load(pair + "/float"))) < 1e-5)
"""


def run(code: str, installed: Path) -> list[str]:
    return evaluate(code, path=[installed], python=INTERPRETER)


def test_logits(checkpoints: Callable[[str], Path], tmp_path: Path, installed: Path) -> None:
    gpt2 = write_pair(tmp_path, tiny("gpt2"), Recipe())
    names = ["mixtral 3-bit act-order", "mixtral 4-bit asymmetric", "llama 2-bit v2", "llama partly"]
    cases = [(name.replace(" ", "-"), str(checkpoints(name).parent), False) for name in names]
    cases += [("direct", cases[-1][1], True), ("gpt2", str(gpt2.parent), False)]
    found = run(COMPARE.format(cases=json.dumps(cases)), installed)
    assert found == [f"{name} True" for name, *_ in cases]


def test_experts_are_one_module_and_keep_their_block(installed: Path) -> None:
    checkpoint = str(ROOT / "examples" / "tiny-mixtral-gptq")
    code = f"""
from transformers import AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
block = AutoModelForCausalLM.from_pretrained({checkpoint!r}).model.layers[0].block_sparse_moe
print(type(block.experts).__name__, isinstance(block, MixtralSparseMoeBlock))
"""
    assert run(code, installed) == ["QuantExperts True"]


def test_scales_keep_their_precision_in_a_half_precision_model(tmp_path: Path, installed: Path) -> None:
    import torch

    checkpoint = write_pair(tmp_path, tiny("llama"), Recipe(scales=torch.float32))
    code = f"""
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(checkpoint)!r}, torch_dtype=torch.float16)
print(model.model.layers[0].mlp.up_proj.checkpoint_tensors().scales.dtype, model.lm_head.weight.dtype)
"""
    assert run(code, installed) == ["torch.float32 torch.float16"]


DAMAGE = {
    "NaN": (
        lambda state: state["model.layers.1.mlp.up_proj.scales"].fill_(float("nan")),
        "NaN values among the scales",
    ),
    "missing": (
        lambda state: [state.pop(name) for name in list(state) if name.startswith("model.layers.1.mlp.up_proj")],
        "layers.1.mlp.up_proj.weight: no tensor in the checkpoint",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named(what: str, tmp_path: Path, installed: Path) -> None:
    damage, message = DAMAGE[what]
    checkpoint = write_pair(tmp_path, tiny("llama"), Recipe())
    edit(checkpoint, damage)
    code = f"""
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained({str(checkpoint)!r})
except ValueError as error:
    print(type(error).__name__, error)
"""
    (line,) = run(code, installed)
    assert line.startswith("CheckpointError")
    assert message in line
