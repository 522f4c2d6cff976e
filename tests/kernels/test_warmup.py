"""What is compiled before the first request is all that requests can reach."""

from __future__ import annotations

import ast
from collections.abc import Hashable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from support.projections import Shape, make, relative_error
from triton import knobs

from graftq.quant_linear.activations import Activation
from graftq.quant_linear.experts_spec import ExpertsForm
from graftq.quant_linear.gpu import linear_launches
from graftq.quant_linear.gpu.experts import launches, ops
from graftq.quant_linear.gpu.experts.stacks import StackKind
from graftq.quant_linear.gpu.tile_heuristics import Device
from graftq.quant_linear.gpu.warmup import compile_kernels, token_counts
from graftq.quant_linear.kernels import launch
from graftq.quant_linear.kernels.launch import VARIABLE, Launch, class_of, compiling_ahead
from graftq.quant_linear.linear import QuantLinear
from graftq.quant_linear.spec import QuantSpec

DEVICES = {"H100": Device("cuda", 90, 132), "A100": Device("cuda", 80, 108), "RTX 4090": Device("cuda", 89, 128)}
HALF = torch.float16


@pytest.fixture(params=DEVICES)
def variants(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> set[Hashable]:
    """What the launches that are made from now on compile, on a device that is not there."""
    found: set[Hashable] = set()

    def launch(kernel: Any, grid: Any, integers: tuple[int, ...], constants: Any, options: Any) -> None:
        names = kernel.arg_names[-len(integers) - len(constants) :]
        found.add((kernel, tuple(map(class_of, names, integers)), constants, options))

    for module in (linear_launches, launches, ops):
        monkeypatch.setattr(module, "Launch", launch)
        monkeypatch.setattr(module, "device_of", lambda _: DEVICES[request.param])
    return found


def both(variants: set[Hashable], call: Any, most: int) -> tuple[set[Hashable], set[Hashable]]:
    """What the counts of :func:`token_counts` compile, and what every count does."""
    found = []
    for counts in (token_counts(most), range(1, most + 1)):
        variants.clear()
        for count in counts:
            call(count)
        found.append(set(variants))
    return found[0], found[1]


def spec(n: int, k: int, bits: int) -> QuantSpec:
    return QuantSpec(bits, k, n, 128, -(-k // 128), False, True, 1, k, n, 0, 0)


@pytest.mark.parametrize("is_ordered", [False, True], ids=["", "act-order"])
@pytest.mark.parametrize(
    ("n", "k", "bits"), [(6144, 4096, 4), (4096, 2048, 3), (2560, 9728, 8), (28672, 4096, 2), (320, 192, 4)]
)
def test_linear(n: int, k: int, bits: int, is_ordered: bool, variants: set[Hashable]) -> None:
    signature = spec(n, k, bits).signature
    groups, atoms = -(-k // 128), -(-k // 128)

    def call(count: int) -> None:
        linear_launches.LinearLaunches(
            linear_launches.LinearKey(
                signature, torch.Size([count, k]), (k, 1), HALF, torch.device("cpu"), atoms, groups, n, 0, HALF, None,
                is_ordered,
            )
        )  # fmt: skip

    ahead, later = both(variants, call, 1025)
    assert later <= ahead
    assert len(ahead) > 3


@pytest.mark.parametrize(
    ("experts", "top_k", "hidden", "inner"),
    [
        (8, 2, 4096, 14336),
        (8, 2, 4096, 7168),
        (128, 8, 2048, 768),
        (60, 4, 2048, 1408),
        (64, 6, 2048, 1408),
        (16, 1, 5120, 8192),
    ],
)
def test_experts(experts: int, top_k: int, hidden: int, inner: int, variants: set[Hashable]) -> None:
    form = ExpertsForm(Activation("silu"), True, spec(inner, hidden, 4), spec(hidden, inner, 4))
    up, down = (
        StackKind(torch.Size([experts, n // 64, k // 128, 1024]), k // 128, HALF, torch.device("cpu"), True, None, None)
        for n, k in ((2 * inner, hidden), (hidden, inner))
    )

    def call(count: int) -> None:
        key = ops.ExpertsKey("", torch.Size([count, hidden]), hidden, HALF, top_k, torch.int32, torch.float32, up, down)
        (ops.OneToken if count == 1 else ops.SeveralTokens)(key, form)

    ahead, later = both(variants, call, 4096)
    assert later <= ahead


class Kernel:
    """In the place of Triton's: remembers what is asked of it."""

    arg_names = ("x", "N", "M", "FLAG")

    def __init__(self) -> None:
        self.run = None
        self.asked: list[tuple[object, ...]] = []

    def warmup(self, *arguments: object, grid: object, **options: object) -> Kernel:
        self.asked.append(("warmup", *arguments))
        return self

    def __getitem__(self, grid: object) -> Any:
        return lambda *arguments, **options: self.asked.append(("run", *arguments[1:]))


def test_launches_compile_once_and_do_not_run() -> None:
    kernel, tensor = Kernel(), torch.empty(16)

    def launches() -> None:
        for integer in (1, 2, 3, 16, 32):
            Launch(kernel, (1, 1, 1), (integer, 5 * integer), (True,), ())(tensor)

    with ThreadPoolExecutor(1) as executor, compiling_ahead(executor) as kernels:
        launches()
        launches()
    assert kernel.asked == [("warmup", torch.float32, integer, 5 * integer, True) for integer in (1, 2, 16)]
    assert len(kernels) == 3
    kernel.asked.clear()
    launches()
    assert kernel.asked == [("run", integer, 5 * integer, True) for integer in (1, 2, 3, 16, 32)]


def test_kernels_are_not_compiled_for_numbers_of_tokens() -> None:
    """Triton knows of each argument with such a name; the interpreter hides that, so the decorators are read."""
    for path in Path(launch.__file__).parent.glob("*.py"):
        for function in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(function, ast.FunctionDef) and function.name.endswith("_kernel"):
                names = {argument.arg for argument in function.args.args}
                is_told = [ast.unparse(each) for each in function.decorator_list] != ["triton.jit"]
                assert is_told == bool(names & set(VARIABLE)), function.name


def test_nothing_is_compiled_after(gpu: str) -> None:
    """Every number of tokens, on a real GPU: Triton's own hook says what is compiled."""
    from graftq.plugin.manager import choose_kernel

    shape = Shape(k=192, n=128, bits=3, group=64, act_order=True)
    layer = QuantLinear.from_tensors(shape.spec(), make(shape, device=gpu), choose_kernel, HALF)
    layer.bind(gpu, HALF)
    x = torch.randn(300, 192, dtype=HALF, device=gpu)
    with torch.no_grad():
        assert compile_kernels(layer, lambda count: layer(x[:count]), 300) > 3
        assert compile_kernels(layer, lambda count: layer(x[:count]), 300) == 0
        compiled: list[object] = []
        before, knobs.runtime.jit_post_compile_hook = (
            knobs.runtime.jit_post_compile_hook,
            lambda **_: compiled.append(_),
        )
        try:
            found = [layer(x[:count]) for count in range(1, 301)]
        finally:
            knobs.runtime.jit_post_compile_hook = before
    assert not compiled
    assert relative_error(found[-1].float(), x.float() @ layer.weight.float().T) < 2e-3
