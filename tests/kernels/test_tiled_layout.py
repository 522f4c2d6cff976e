"""TiledLayout restores every checkpoint bit for bit, whatever its shape, order or filling."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from support.projections import Shape, make

from graftq.quant_linear.gpu.tiled_layout import TiledLayout
from graftq.quant_linear.layouts import GptqTensors
from graftq.quant_linear.packing import zero_points
from graftq.quant_linear.row_order import NO_ROW


def assert_same(restored: GptqTensors, stored: GptqTensors) -> None:
    for name, tensor in vars(stored).items():
        other = getattr(restored, name)
        assert (other is None) == (tensor is None), name
        if tensor is not None:
            assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape), name
            assert torch.equal(other, tensor), name


SHAPES = [
    Shape(bits=bits, k=k, n=n, group=group, act_order=act_order, sym=False)
    for bits, (k, n), group, act_order in product(
        (2, 3, 4, 8), ((128, 64), (288, 72), (1056, 200)), (-1, 16, 48, 128), (False, True)
    )
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_round_trip(shape: Shape):
    stored = make(shape)
    layout = TiledLayout(shape.spec())
    assert_same(layout.unpack(layout.pack(stored)), stored)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_scales_and_bias_keep_their_dtype(dtype: torch.dtype):
    shape = Shape(group=48, scales=dtype, bias=True)
    stored = make(shape)
    layout = TiledLayout(shape.spec())
    assert_same(layout.unpack(layout.pack(stored)), stored)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_unused_bits_of_the_last_words_survive(bits: int):
    spec = replace(Shape(bits=bits, k=132, n=72, group=-1).spec(), sym=False)
    random = torch.Generator().manual_seed(1)

    def words(*size: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31, size, generator=random, dtype=torch.int64).to(torch.int32)

    stored = GptqTensors(
        words(spec.packed_rows, spec.padded_out),
        words(spec.num_groups, spec.packed_zero_columns),
        torch.rand(1, spec.padded_out),
    )
    layout = TiledLayout(spec)
    assert_same(layout.unpack(layout.pack(stored)), stored)


@pytest.mark.parametrize("group", [128, 48])
def test_an_odd_number_of_zero_points(group: int):
    shape = Shape(n=71, group=group, sym=False)
    stored, layout = make(shape), TiledLayout(shape.spec())
    packed = layout.pack(stored)
    assert_same(layout.unpack(packed), stored)
    zeros = packed["zeros"].view(torch.int16)
    assert zeros.shape[1] == 72
    assert torch.equal(zeros[0, :71], zero_points(stored, shape.spec())[0].short())


def test_padding_written_by_the_checkpoint_survives():
    shape = Shape(k=256, n=128, group=32, act_order=True)
    stored = make(shape)
    spec = replace(shape.spec(), in_features=250, out_features=120)
    layout = TiledLayout(spec)
    assert_same(layout.unpack(layout.pack(stored)), stored)


@pytest.mark.parametrize("group", [128, 256])
@pytest.mark.parametrize("k", [144, 160, 272, 384, 400])
def test_no_atom_lies_beyond_the_last_group(k: int, group: int):
    """Kernels find an atom's group by division: one of padding alone would read scales that are not there."""
    shape = Shape(k=k, n=64, group=group, act_order=True)
    packed = TiledLayout(shape.spec()).pack(make(shape))
    atoms, groups = packed["codes"].shape[1], len(packed["scales"])
    assert (atoms - 1) * 128 // group < groups


def test_groups_of_uneven_length_and_an_empty_one():
    spec = replace(Shape(k=128, n=64, group=32, act_order=True).spec())
    stored = make(Shape(k=128, n=64, group=32, act_order=True))
    g_idx = torch.tensor([0] * 70 + [1] + [3] * 57, dtype=torch.int32)[torch.randperm(128)]
    stored = replace(stored, g_idx=g_idx)
    layout = TiledLayout(spec)
    packed = layout.pack(stored)
    assert layout.group(packed["scales"].shape[0]) == 16
    assert_same(layout.unpack(packed), stored)


def test_a_single_group_needs_no_order():
    shape = Shape(group=-1, act_order=True)
    assert "order" not in TiledLayout(shape.spec()).pack(make(shape))


def test_act_order_sorts_rows_by_group_and_keeps_their_order_within():
    shape = Shape(k=256, group=64, act_order=True)
    stored = make(shape)
    order = TiledLayout(shape.spec()).pack(stored)["order"].long()
    groups = stored.g_idx[order]
    assert (groups.diff() >= 0).all()
    assert all((order[groups == group].diff() > 0).all() for group in range(4))


def test_group_sizes_without_a_kernel_become_padded_units():
    shape = Shape(k=240, group=48, act_order=True)
    layout = TiledLayout(shape.spec())
    packed = layout.pack(make(shape))
    assert packed.form is True
    assert layout.group(packed["scales"].shape[0]) == 16
    assert "order" not in TiledLayout(replace(shape, act_order=False).spec()).pack(
        make(replace(shape, act_order=False))
    )
    assert (packed["order"] != NO_ROW).sum() == 256  # 240, and the 16 that fill the last block of 32


def test_outputs_are_padded_to_what_one_program_computes():
    shape = Shape(n=136)
    assert TiledLayout(shape.spec()).pack(make(shape))["codes"].shape[0] == 4


def test_three_bit_codes_take_three_bits():
    shape = Shape(bits=3, k=1024, n=256)
    packed = TiledLayout(shape.spec()).pack(make(shape))
    assert packed["codes"].nbytes + packed["high"].nbytes == 1024 * 256 * 3 // 8
