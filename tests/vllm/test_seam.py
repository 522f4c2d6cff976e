"""What a real vLLM finds of graftq, without an engine."""

from __future__ import annotations

import pytest
from support.processes import evaluate, run

PLAIN = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
REFUSED = [{**PLAIN, "desc_act": True}, {**PLAIN, "bits": 3}, {**PLAIN, "sym": False}]
"""What stock vLLM does not load, since 0.30."""
SIGNATURES = """
import inspect
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase
from vllm.model_executor.layers.linear import LinearMethodBase
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from graftq.adapters.vllm.config import GraftqConfig
from graftq.adapters.vllm.linear import GraftqLinearMethod
from graftq.adapters.vllm.fused_moe import GraftqMoEMethod

def names(function):
    return [name for name in inspect.signature(function).parameters if name != "self"]

for ours in (GraftqConfig, GraftqLinearMethod, GraftqMoEMethod):
    assert not inspect.isabstract(ours), ours.__abstractmethods__
    base = next(each for each in ours.__mro__ if each.__module__.startswith("vllm."))
    defined = set().union(*map(vars, ours.__mro__[: ours.__mro__.index(base)]))
    for name in defined & set(dir(base)):
        if not name.startswith("__") and inspect.isroutine(getattr(base, name)):
            print(f"{ours.__name__}.{name}", names(getattr(ours, name)) == names(getattr(base, name)))
"""
ASKING = """
import os
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config
for value in ("all", "unsupported") if "graftq" in QUANTIZATION_METHODS else ():
    os.environ["GRAFTQ_VLLM"] = value
    ask = get_quantization_config("graftq").override_quantization_method
    print("answers", *(ask(raw, None, hf_config=None) for raw in CHECKPOINTS))
"""
QUIET = {"VLLM_LOGGING_LEVEL": "ERROR"}


def test_signatures_are_those_of_the_base_classes(interpreter: str) -> None:
    found = [line.split() for line in evaluate(SIGNATURES, python=interpreter, **QUIET) if line.startswith("Graftq")]
    assert len(found) > 10
    assert [name for name, same in found if same != "True"] == []


@pytest.mark.parametrize(
    ("environment", "answers"),
    [
        ({"VLLM_PLUGINS": "graftq"}, ["answers graftq graftq graftq graftq", "answers graftq graftq graftq None"]),
        ({"VLLM_PLUGINS": "another"}, []),
        ({"GRAFTQ_DISABLE": "1"}, []),
    ],
    ids=["the only plugin", "not among the plugins", "disabled"],
)
def test_who_takes_what(environment: dict[str, str], answers: list[str], interpreter: str) -> None:
    found = evaluate(f"CHECKPOINTS = {[*REFUSED, PLAIN]}{ASKING}", python=interpreter, **QUIET, **environment)
    assert [line for line in found if line.startswith("answers")] == answers


def test_another_version_is_left_alone(interpreter: str) -> None:
    code = f"import vllm; vllm.__version__ = '0.29.0'\nCHECKPOINTS = {REFUSED}{ASKING}"
    done = run("-c", code, python=interpreter, **QUIET)
    assert "answers" not in done.stdout
    (said,) = [line for line in done.stderr.splitlines() if "graftq" in line]
    assert "graftq knows vLLM 0.30 to 0.33, and this is 0.29.0" in said
