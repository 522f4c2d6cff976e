"""Dense layers on a CPU: right for every configuration, in every dtype, forwards and backwards."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.projections import Shape, expected, make, relative_error

from graftq.plugin.manager import choose_kernel
from graftq.quant_linear.cpu import dequantized_matmul as cpu_tiles
from graftq.quant_linear.cpu import kernels as cpu_kernels
from graftq.quant_linear.cpu.provider import CpuProvider
from graftq.quant_linear.layouts import GptqTensors
from graftq.quant_linear.linear import QuantLinear
from graftq.quant_linear.packing import dequantize
from graftq.quant_linear.reference import TorchProvider
from graftq.quant_linear.selection import Accepted, Rejected, Request

TOLERANCE = {torch.float32: 2e-6, torch.float16: 8e-3, torch.bfloat16: 8e-3}
SHAPES = [
    *(
        Shape(bits, 256, 64, group, act_order, sym, zero_offset=int(sym))
        for bits in (2, 3, 4, 8)
        for group, act_order in ((-1, False), (32, True), (128, False), (128, True))
        for sym in (True, False)
    ),
    Shape(4, 1000, 72, 128, act_order=True, bias=True),
    Shape(3, 320, 104, 64, sym=False, scales=torch.float32),
    Shape(8, 96, 8, -1, bias=True, scales=torch.bfloat16),
    *(Shape(bits, 320, 40, group, act_order) for bits in (4, 8) for group in (16, 48) for act_order in (True, False)),
    Shape(4, 512, 64, 512 * 3 // 4, act_order=True),
]


@pytest.fixture(params=["nibbles", "bytes"])
def kept_as(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Either way to keep 8 bits, whatever the size."""
    least = 0 if request.param == "bytes" else 2**60
    monkeypatch.setattr(cpu_kernels, "_LEAST_BYTES", dict.fromkeys((None, 32, 64), least))


def multiply(x: torch.Tensor, tensors: GptqTensors, shape: Shape) -> torch.Tensor:
    spec, provider = shape.spec(), CpuProvider()
    return provider.linear(x, provider.layout(spec).pack(tensors), spec)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product(shape: Shape, dtype: torch.dtype) -> None:
    tensors = make(shape)
    for tokens in (1, 5, 48):
        x = torch.randn(tokens, shape.k).to(dtype)
        out = multiply(x, tensors, shape)
        assert out.dtype == dtype
        assert relative_error(out, expected(x, tensors, shape.spec())) < TOLERANCE[dtype]


@pytest.mark.usefixtures("kept_as")
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_scales_of_both_signs(bits: int) -> None:
    """As graftq makes them."""
    shape = Shape(bits, act_order=True)
    tensors = make(shape, scale=-0.01)
    for dtype, tolerance in TOLERANCE.items():
        for tokens in (1, 5, 48):
            x = torch.randn(tokens, shape.k).to(dtype)
            assert relative_error(multiply(x, tensors, shape), expected(x, tensors, shape.spec())) < tolerance


@pytest.mark.usefixtures("kept_as")
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape.bits == 8], ids=str)
def test_eight_bits_either_way(shape: Shape) -> None:
    tensors = make(shape)
    for dtype, tolerance in TOLERANCE.items():
        for tokens in (1, 5, 48):
            x = torch.randn(tokens, shape.k).to(dtype)
            out = multiply(x, tensors, shape)
            assert relative_error(out, expected(x, tensors, shape.spec())) < tolerance


@pytest.mark.usefixtures("kept_as")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_without_their_kernels_tiles_do(dtype: torch.dtype, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernels, "int4_block", lambda: None)
    monkeypatch.setattr(cpu_kernels, "has_int8_kernel", lambda: False)
    shape = Shape(bits, act_order=True)
    tensors, x = make(shape), torch.randn(3, shape.k).to(dtype)
    assert relative_error(multiply(x, tensors, shape), expected(x, tensors, shape.spec())) < TOLERANCE[dtype]


@pytest.mark.usefixtures("kept_as")
@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("tiles_in", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tile_bytes", [1, 100_000], ids="tiles of {} bytes".format)
def test_tiles_of_any_size(
    tiles_in: torch.dtype, tile_bytes: int, sym: bool, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_tiles, "TILE_BYTES", tile_bytes)
    monkeypatch.setattr(cpu_kernels, "fast_dtype", lambda: tiles_in)
    shape = Shape(bits, n=216, sym=sym, bias=True)
    tensors, x = make(shape), torch.randn(64, shape.k).to(torch.bfloat16)
    assert relative_error(multiply(x, tensors, shape), expected(x, tensors, shape.spec())) < 6e-3


def test_large_activations_stay_finite() -> None:
    shape = Shape(act_order=True)
    tensors, x = make(shape, scale=1e-4), torch.full((1, shape.k), 60000.0, dtype=torch.float16)
    x[:, ::2] *= -1
    assert relative_error(multiply(x, tensors, shape), expected(x, tensors, shape.spec())) < 2e-2


def test_leading_dimensions_strides_and_no_tokens() -> None:
    shape = Shape(act_order=True)
    tensors = make(shape)
    x = torch.randn(shape.k, 2, 3).to(torch.bfloat16).permute(1, 2, 0)
    out = multiply(x, tensors, shape)
    assert out.shape == (2, 3, shape.n)
    assert relative_error(out, expected(x, tensors, shape.spec())) < 6e-3
    assert multiply(x[:0], tensors, shape).shape == (0, 3, shape.n)


def test_an_input_of_the_wrong_width_is_refused() -> None:
    shape = Shape()
    with pytest.raises(RuntimeError, match="width 128 for a layer of 256"):
        multiply(torch.randn(4, 128), make(shape), shape)


@pytest.mark.usefixtures("kept_as")
@pytest.mark.parametrize("shape", [Shape(act_order=True), Shape(8, 320, 72, 48, sym=False, bias=True)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_to_the_activations(shape: Shape, dtype: torch.dtype) -> None:
    tensors = make(shape)
    x = torch.randn(7, shape.k).to(dtype).requires_grad_()
    grad = torch.randn(7, shape.n).to(dtype)
    multiply(x, tensors, shape).backward(grad)
    assert x.grad is not None
    assert relative_error(x.grad, grad.double() @ dequantize(tensors, shape.spec()).double()) < TOLERANCE[dtype]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own doing
def test_compiles_into_one_graph() -> None:
    shape = Shape(act_order=True, bias=True)
    tensors = make(shape)
    layer = QuantLinear.from_tensors(shape.spec(), tensors, choose_kernel, torch.bfloat16)
    layer.bind("cpu", torch.bfloat16)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, shape.k, dtype=torch.bfloat16, requires_grad=True)
    out = compiled(x)
    assert out.equal(layer(x))
    out.sum().backward()
    assert x.grad is not None


def test_chosen_for_cpus_alone() -> None:
    spec, provider = Shape().spec(), CpuProvider()
    for dtype in TOLERANCE:
        assert choose_kernel(Request(spec, "cpu", dtype)).provider.name == "cpu"
    assert choose_kernel(Request(spec, "cpu", torch.float64)).provider.name == "torch"
    assert choose_kernel(Request(spec, "cpu", torch.float32, pinned=True)).provider.name == "torch"
    assert isinstance(provider.judge(Request(spec, "cuda", torch.float16)), Rejected)
    assert isinstance(provider.judge(Request(spec, "cpu", torch.float16)), Accepted)


def test_bytes_where_a_product_for_each_unit_pays() -> None:
    assert cpu_kernels.takes_bytes(Shape(8, 4096, 2**15, -1).spec())
    assert not cpu_kernels.takes_bytes(Shape(8, 4096, 256, 128).spec())
    assert not cpu_kernels.takes_bytes(Shape(4, 4096, 2**15, -1).spec())


def test_the_kernels_are_found() -> None:
    """Not a must for being right, but all of the speed: a torch that lost it should be noticed here."""
    capability = torch.backends.cpu.get_cpu_capability()
    assert cpu_kernels.int4_block() == {"AVX512": 64, "AVX2": 32}.get(capability)
    assert cpu_kernels.has_int8_kernel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("outputs", "stored"), [(64, 128), (320, 384), (288, 384)], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_outputs_that_the_writer_padded_are_cut(bits: int, outputs: int, stored: int, dtype: torch.dtype) -> None:
    shape = Shape(bits=bits, k=64, n=stored, group=32)
    spec, tensors = replace(shape.spec(), out_features=outputs), make(shape)
    for tokens in (1, 40):
        x = torch.randn(tokens, 64).to(dtype)
        found = CpuProvider().linear(x, CpuProvider().layout(spec).pack(tensors), spec).float()
        expected = TorchProvider().linear(x.float(), TorchProvider().layout(spec).pack(tensors), spec)
        assert found.shape == (tokens, outputs)
        assert (found - expected).norm() < (1e-5 if dtype == torch.float32 else 1e-2) * expected.norm()
