"""The Triton kernels against float32 weights and float64 sums: a GPU runs the full grid, the interpreter a part."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from support.projections import Shape, expected, make, relative_error

from graftq.quant_linear.gpu.provider import TritonProvider
from graftq.quant_linear.packing import dequantize

# Triton's interpreter turns one-element arrays into numbers, which numpy deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")

LIMIT = {torch.float16: 2e-3, torch.bfloat16: 1e-2}
FULL = torch.cuda.is_available()
# The interpreter does not know bfloat16 arithmetic.
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16] if FULL else [torch.float16], ids=str)


def run(shape: Shape, x: torch.Tensor, **filling: object) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernels' answer and the reference's."""
    spec = shape.spec()
    stored = make(shape, device=x.device.type, **filling)
    provider = TritonProvider()
    out = provider.linear(x, provider.layout(spec).pack(stored), spec)
    return out, expected(x.reshape(-1, spec.in_features), stored, spec).view(*x.shape[:-1], spec.out_features)


def check(shape: Shape, x: torch.Tensor, **filling: object) -> None:
    out, reference = run(shape, x, **filling)
    assert (out.dtype, out.shape) == (x.dtype, reference.shape)
    assert relative_error(out, reference) < LIMIT[x.dtype]


GRID = [
    Shape(bits=bits, k=k, n=n, group=group, act_order=act_order, sym=sym)
    for bits, (k, n), group, act_order, sym in product(
        (2, 3, 4, 8),
        ((2048, 512), (320, 136)) if FULL else ((320, 72),),
        (-1, 16, 32, 64, 128, 256, 1024, 48) if FULL else (-1, 32, 128, 48),
        (False, True),
        (True, False),
    )
]


@DTYPES
@pytest.mark.parametrize("shape", GRID, ids=str)
def test_grid(shape: Shape, dtype: torch.dtype, device: str):
    for m in (1, 3, 20, 50, 100, 1100) if FULL else (1, 3):
        check(shape, torch.randn(m, shape.k, device=device).to(dtype))


@DTYPES
@pytest.mark.parametrize("m", [0, 1, 2, 15, 16, 17, 64, 65, 129, 300, 1025, 16384] if FULL else [0, 1, 17, 65, 130])
def test_tokens(m: int, dtype: torch.dtype, device: str):
    shape = Shape(k=512, n=192, act_order=True, bias=True)
    out, reference = run(shape, torch.randn(m, 512, device=device).to(dtype))
    assert out.shape == (m, 192)
    assert m == 0 or relative_error(out, reference) < LIMIT[dtype]


@pytest.mark.parametrize("group", [-1, 32, 128])
def test_the_tile_for_many_tokens_and_outputs(group: int, gpu: str):
    check(Shape(k=512, n=4104, group=group), torch.randn(700, 512, device=gpu).half())


@pytest.mark.parametrize("n", [8, 24, 64, 136, 4104 if FULL else 72])
@pytest.mark.parametrize("m", [1, 5])
@pytest.mark.parametrize("bits", [2, 4])  # at one token, a program computes 128 or 64 outputs
def test_any_multiple_of_eight_outputs(bits: int, n: int, m: int, device: str):
    check(Shape(bits=bits, n=n, sym=False, bias=True), torch.randn(m, 256, device=device).half())


@pytest.mark.parametrize("k", [32, 128, 160, 992, 4128 if FULL else 288])
@pytest.mark.parametrize("m", [1, 5])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_any_inputs(bits: int, k: int, m: int, device: str):
    check(Shape(bits=bits, k=k, sym=False), torch.randn(m, k, device=device).half())


@DTYPES
@pytest.mark.parametrize("scales", [torch.float16, torch.bfloat16, torch.float32], ids=["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("group", [32, 128])
def test_scales_in_any_dtype(group: int, scales: torch.dtype, dtype: torch.dtype, device: str):
    for m in (1, 5):
        check(Shape(group=group, scales=scales, bias=True), torch.randn(m, 256, device=device).to(dtype))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("end", ["lowest", "highest"])
def test_all_codes_equal(bits: int, end: str, device: str):
    code = 0 if end == "lowest" else 2**bits - 1
    for m in (1, 5):
        check(Shape(bits=bits), torch.rand(m, 256, device=device).half(), codes=code)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zero_points_from_nought_to_beyond_the_codes(bits: int, offset: int, device: str):
    shape = Shape(bits=bits, sym=False, zero_offset=offset)
    spec, stored = shape.spec(), make(shape, device=device)
    stored.qzeros[0], stored.qzeros[1] = 0, -1  # all bits clear, all bits set
    provider = TritonProvider()
    for m in (1, 5):
        x = torch.randn(m, 256, device=device).half()
        out = provider.linear(x, provider.layout(spec).pack(stored), spec)
        assert relative_error(out, expected(x, stored, spec)) < LIMIT[x.dtype]


@pytest.mark.parametrize(("scale", "size"), [(6e-8, 3e3), (60.0, 1e-2), (1e-3, 6e4), (10.0, 1e-6)])
def test_extreme_scales_and_activations(scale: float, size: float, device: str):
    for m in (1, 5):
        check(Shape(n=64), (torch.randn(m, 256, device=device).clamp(-1, 1) * size).half(), scale=scale)


@pytest.mark.parametrize("act_order", [False, True], ids=["seq", "act"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_scales_of_both_signs(bits: int, act_order: bool, device: str):
    """As graftq makes them."""
    for m in (1, 5, 40):
        check(Shape(bits=bits, act_order=act_order), torch.randn(m, 256, device=device).half(), scale=-0.01)


@pytest.mark.parametrize("act_order", [False, True], ids=["seq", "act"])
def test_a_last_group_of_one_row(act_order: bool, device: str):
    for m in (1, 5):
        check(Shape(k=288, group=287, act_order=act_order, sym=False), torch.randn(m, 288, device=device).half())


def test_groups_of_one_row(device: str):
    check(Shape(k=64, group=1, act_order=True, sym=False), torch.randn(3, 64, device=device).half())


@pytest.mark.parametrize("view", ["transposed", "sliced", "batched"])
def test_any_strides(view: str, device: str):
    shape = Shape(act_order=True)
    x = {
        "transposed": torch.randn(256, 5, device=device).half().T,
        "sliced": torch.randn(5, 300, device=device).half()[:, 7:263],
        "batched": torch.randn(3, 2, 256, device=device).half().transpose(0, 1),
    }[view]
    check(shape, x)


@pytest.mark.parametrize("act_order", [False, True], ids=["seq", "act"])
def test_gradient_to_the_activations(act_order: bool, device: str):
    shape = Shape(k=320, group=32, act_order=act_order, sym=False, bias=True)
    spec, stored = shape.spec(), make(shape, device=device)
    provider = TritonProvider()
    packed = provider.layout(spec).pack(stored)
    x = torch.randn(5, 320, device=device).half().requires_grad_()
    grad = torch.randn(5, 128, device=device).half()
    provider.linear(x, packed, spec).backward(grad)
    assert relative_error(x.grad, grad.double() @ dequantize(stored, spec).double()) < LIMIT[x.dtype]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own
def test_compiles_to_one_graph(gpu: str):
    shape = Shape(k=512, n=256, act_order=True)
    spec, stored = shape.spec(), make(shape, device=gpu)
    provider = TritonProvider()
    packed = provider.layout(spec).pack(stored)
    compiled = torch.compile(lambda x: provider.linear(x * 2, packed, spec) + 1, fullgraph=True)
    for m in (1, 7):
        x = torch.randn(m, 512, device=gpu).half()
        assert relative_error(compiled(x), expected(x * 2, stored, spec) + 1) < LIMIT[x.dtype]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own
def test_compiles_with_gradients(device: str):
    shape = Shape(k=320, group=32, act_order=True)
    spec, stored = shape.spec(), make(shape, device=device)
    provider = TritonProvider()
    packed = provider.layout(spec).pack(stored)
    compiled = torch.compile(lambda x: provider.linear(x, packed, spec), backend="eager", fullgraph=True)
    x = torch.randn(5, 320, device=device).half().requires_grad_()
    grad = torch.randn(5, 128, device=device).half()
    compiled(x).backward(grad)
    assert relative_error(x.grad, grad.double() @ dequantize(stored, spec).double()) < LIMIT[x.dtype]


@pytest.mark.parametrize("m", [1, 16, 100, 1500])
def test_graph_capture_and_repeatable_bits(m: int, gpu: str):
    shape = Shape(k=4096, n=1024, act_order=True)
    spec, stored = shape.spec(), make(shape, device=gpu)
    provider = TritonProvider()
    packed = provider.layout(spec).pack(stored)
    x = torch.randn(m, 4096, device=gpu).half()
    eager = provider.linear(x, packed, spec)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = provider.linear(x, packed, spec)
    for _ in range(20):
        captured.fill_(float("nan"))
        graph.replay()
        assert torch.equal(captured, eager)
    assert relative_error(eager, expected(x, stored, spec)) < LIMIT[x.dtype]


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_no_host_synchronization(gpu: str):
    shape = Shape(k=512, n=256, act_order=True)
    spec, stored = shape.spec(), make(shape, device=gpu)
    provider = TritonProvider()
    packed = provider.layout(spec).pack(stored)
    inputs = [torch.randn(m, 512, device=gpu).half() for m in (1, 5, 1500)]
    for x in inputs:
        provider.linear(x, packed, spec)  # compiles, and sets up the counters
    torch.cuda.set_sync_debug_mode("error")
    try:
        for x in inputs:
            provider.linear(x, packed, spec)
    finally:
        torch.cuda.set_sync_debug_mode("default")
