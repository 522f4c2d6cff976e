"""Packed tensors have dtypes that NCCL can send: ``DataParallel`` and FSDP broadcast all of a model's buffers."""

from __future__ import annotations

import pytest
import torch
from support.experts import Experts
from support.projections import Shape, make

from graftq.quant_linear.cpu.provider import CpuProvider
from graftq.quant_linear.gpu.provider import TritonProvider
from graftq.quant_linear.linear import QuantLinear
from graftq.quant_linear.selection import KernelProvider, Selection

INTEGERS = {torch.int8, torch.uint8, torch.int32, torch.int64}
FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
PROVIDERS = pytest.mark.parametrize("provider", [TritonProvider(), CpuProvider()], ids=["triton", "cpu"])
WIDTHS = pytest.mark.parametrize("bits", [2, 3, 4, 8])
SYMMETRY = pytest.mark.parametrize("sym", [True, False], ids=["symmetric", "asymmetric"])


def assert_can_be_sent(module: torch.nn.Module) -> None:
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    assert any(name.endswith("codes") for name in tensors)
    assert {tensor.dtype for tensor in tensors.values()} <= INTEGERS | FLOATS


@PROVIDERS
@SYMMETRY
@WIDTHS
def test_layers(bits: int, sym: bool, provider: KernelProvider) -> None:
    shape = Shape(bits=bits, sym=sym, act_order=True, bias=True)
    layer = QuantLinear.from_tensors(shape.spec(), make(shape), lambda _: Selection(provider, {}), torch.float16)
    layer.bind("cpu", torch.float16)
    assert_can_be_sent(layer)


@PROVIDERS
@SYMMETRY
@WIDTHS
def test_experts(bits: int, sym: bool, provider: KernelProvider) -> None:
    pytest.importorskip("triton")
    module = Experts(bits=bits, sym=sym, bias=True).module(provider)
    module.bind("cpu", torch.float16)
    assert_can_be_sent(module)
