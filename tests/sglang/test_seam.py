"""What a real SGLang finds of graftq, without an engine."""

from __future__ import annotations

import pytest
from support.processes import evaluate, run

STOCK = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True, "sym": True}
CHECKPOINTS = [{**STOCK, "bits": 3}, {**STOCK, "sym": False}, STOCK, {"quant_method": "awq"}]
SIGNATURES = """
import inspect
from sglang.srt.layers.quantization.base_config import FusedMoEMethodBase, LinearMethodBase, QuantizationConfig
from graftq.adapters.sglang.config import GraftqConfig
from graftq.adapters.sglang.linear import GraftqLinearMethod
from graftq.adapters.sglang.fused_moe import GraftqMoEMethod

def names(function):
    return [name for name in inspect.signature(function).parameters if name != "self"]

for ours in (GraftqConfig, GraftqLinearMethod, GraftqMoEMethod):
    assert not inspect.isabstract(ours), ours.__abstractmethods__
    base = next(each for each in ours.__mro__ if each.__module__.startswith("sglang."))
    defined = set().union(*map(vars, ours.__mro__[: ours.__mro__.index(base)]))
    for name in defined & set(dir(base)):
        found = getattr(base, name)
        if not name.startswith("__") and inspect.isroutine(found):
            wanted = names(found)
            same = names(getattr(ours, name)) == wanted or "args" in wanted
            print(f"{ours.__name__}.{name}", same)
"""
ASKING = """
import sglang
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.layers.quantization import QUANTIZATION_METHODS
from sglang.srt.server_args import QUANTIZATION_CHOICES
print("first", next(iter(QUANTIZATION_METHODS)), "graftq" in QUANTIZATION_CHOICES)
if "graftq" in QUANTIZATION_METHODS:
    take = QUANTIZATION_METHODS["graftq"].override_quantization_method
    print("answers", *(take(raw, None) for raw in CHECKPOINTS))
    from graftq.adapters.sglang import stock
    for name in stock.HOMES:
        getattr(stock, name)
    from sglang.srt.model_loader import loader, utils, weight_utils
    for module, name in ((weight_utils, "get_quant_config"), (loader, "get_quant_config"),
                         (loader, "_initialize_model"), (utils, "get_model_architecture"),
                         (loader, "get_model_architecture")):
        print("hooked", name, hasattr(getattr(module, name), "__wrapped__"))
"""


def asked(interpreter: str, environment: dict[str, str]) -> list[str]:
    code = f"CHECKPOINTS = {CHECKPOINTS}{ASKING}"
    lines = evaluate(code, python=interpreter, **environment)
    return [line for line in lines if line.startswith(("first", "answers", "hooked"))]


def test_signatures_are_those_of_the_base_classes(interpreter: str, cpu_engine: dict[str, str]) -> None:
    found = [line.split() for line in evaluate(SIGNATURES, python=interpreter, **cpu_engine)]
    ours = [line for line in found if line and line[0].startswith("Graftq")]
    assert len(ours) > 10
    assert [line[0] for line in ours if line[1] != "True"] == []


@pytest.mark.parametrize("choice", ["all", "unsupported"])
def test_who_takes_what(choice: str, interpreter: str, cpu_engine: dict[str, str]) -> None:
    """On this CPU SGLang itself runs nothing, since its kernels are left out."""
    first, answers, *hooked = asked(interpreter, {**cpu_engine, "GRAFTQ_SGLANG": choice})
    assert first == "first graftq True"
    assert answers == "answers graftq graftq graftq None"
    assert len(hooked) == 5
    assert all(line.endswith("True") for line in hooked)


@pytest.mark.parametrize(
    "changes",
    [{"GRAFTQ_SGLANG": ""}, {"GRAFTQ_DISABLE": "1"}, {"SGLANG_PLUGINS": "another"}],
    ids=["by default", "disabled", "not among the plugins"],
)
def test_left_alone(changes: dict[str, str], interpreter: str, cpu_engine: dict[str, str]) -> None:
    assert asked(interpreter, {**cpu_engine, **changes}) == ["first fp8 False"]


def test_another_version_is_left_alone(interpreter: str, cpu_engine: dict[str, str]) -> None:
    code = f"import sglang; sglang.__version__ = '0.5.22'\nCHECKPOINTS = {CHECKPOINTS}{ASKING}"
    done = run("-c", code, python=interpreter, **cpu_engine)
    assert "first fp8 False" in done.stdout
    (said,) = [line for line in done.stderr.splitlines() if "graftq knows" in line]
    assert "graftq knows SGLang 0.5.23, and this is 0.5.22" in said
