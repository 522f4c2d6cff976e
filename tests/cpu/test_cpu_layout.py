"""The layout for CPUs gives back what it was given, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.projections import Shape, make

from graftq.quant_linear.cpu import layout as cpu_layout
from graftq.quant_linear.cpu.layout import CpuLayout, Int4Layout, Int8Layout
from graftq.quant_linear.layouts import GptqTensors
from graftq.quant_linear.spec import QuantSpec

SHAPES = [
    Shape(bits, k, n, group, act_order, sym=False, bias=True)
    for bits in (2, 3, 4, 8)
    for k, n in ((256, 64), (1000, 72))
    for group, act_order in ((-1, False), (16, True), (48, False), (128, True), (128, False))
]


def assert_same(found: GptqTensors, stored: GptqTensors) -> None:
    for name, tensor in vars(stored).items():
        other = getattr(found, name)
        assert (tensor is None and other is None) or (tensor.dtype == other.dtype and tensor.equal(other)), name


def layouts(spec: QuantSpec) -> list[CpuLayout]:
    nibbles: list[CpuLayout] = [Int4Layout(spec, block) for block in (32, 64)]
    return [*nibbles, Int8Layout(spec)] if spec.bits == 8 else nibbles


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_round_trip(shape: Shape) -> None:
    for layout in layouts(shape.spec()):
        stored = make(shape)
        packed = layout.pack(stored)
        assert_same(layout.unpack(packed), stored)
        assert packed["codes"].nbytes * 8 >= shape.k * shape.n * max(4, shape.bits)


@pytest.mark.parametrize("bits", [4, 8])
def test_in_chunks(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_layout, "_CHUNK_CODES", 1)
    shape = Shape(bits, n=200, act_order=True)
    stored = make(shape)
    for layout in layouts(shape.spec()):
        assert_same(layout.unpack(layout.pack(stored)), stored)


@pytest.mark.parametrize("bits", [3, 8])
def test_padding_of_the_writer_and_unused_bits(bits: int) -> None:
    """Columns and rows beyond the layer's own, with anything in them, come back too."""
    shape = Shape(bits, 96, 64, 32, act_order=True)
    stored = make(shape)
    spec = replace(shape.spec(), in_features=70, out_features=60)
    stored = replace(stored, qweight=torch.randint(-(2**31), 2**31 - 1, stored.qweight.shape, dtype=torch.int32))
    for layout in layouts(spec):
        assert_same(layout.unpack(layout.pack(stored)), stored)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("lengths", [(5, 91, 32), (0, 128, 0), (64, 64, 0)], ids=str)
def test_uneven_groups(lengths: tuple[int, ...], bits: int) -> None:
    """As tensor parallelism cuts them."""
    shape = Shape(bits, sum(lengths), 64, 48, act_order=True)
    spec = replace(shape.spec(), num_groups=len(lengths))
    stored = make(replace(shape, group=-(-shape.k // 3)))
    g_idx = torch.repeat_interleave(torch.tensor(lengths))[torch.randperm(shape.k)].to(torch.int32)
    stored = replace(stored, g_idx=g_idx)
    for layout in layouts(spec):
        assert_same(layout.unpack(layout.pack(stored)), stored)


@pytest.mark.parametrize(
    ("group", "act_order", "nibbles", "octets"),
    [
        (-1, False, 256, 1024),
        (1024, False, 256, 1024),
        (128, True, 128, 128),
        (384, False, 128, 128),
        (32, True, 32, 32),
        (16, False, 32, 32),
    ],
)
def test_units(group: int, act_order: bool, nibbles: int, octets: int) -> None:
    shape = Shape(4, 3072, 8, group, act_order)
    stored = make(shape)
    assert Int4Layout(shape.spec(), 64).unit(stored.g_idx) == nibbles
    assert Int8Layout(shape.spec()).unit(stored.g_idx) == octets


def test_what_is_kept_beside_the_codes_is_small() -> None:
    shape = Shape(4, 4096, 64, 128, act_order=True)
    packed = Int4Layout(shape.spec(), 64).pack(make(shape))
    assert packed["codes"].nbytes == shape.k * shape.n // 2
    assert sum(tensor.nbytes for tensor in packed.values()) < 1.4 * packed["codes"].nbytes  # 64 outputs: order, g_idx
