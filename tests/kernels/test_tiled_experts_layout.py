"""TiledExpertsLayout restores every projection bit for bit, and knows when gate and up may interleave."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from support.experts import ORDERS, Experts, build
from support.projections import Shape

from graftq.quant_linear.gpu.experts.layout import TiledExpertsLayout
from graftq.quant_linear.layouts import GptqTensors
from graftq.quant_linear.reference import TorchExperts

Made = list[dict[str, tuple[Shape, GptqTensors]]]


def packed_and_spec(case: Experts, tensors: Made) -> tuple[dict[str, torch.Tensor], TiledExpertsLayout]:
    spec = build(case, tensors, TorchExperts(), "cpu", torch.float32).spec
    layout = TiledExpertsLayout(spec)
    return layout.pack(lambda name, expert: tensors[expert][name][1]), layout


def assert_restores(case: Experts, tensors: Made) -> dict[str, torch.Tensor]:
    packed, layout = packed_and_spec(case, tensors)
    for expert, made in enumerate(tensors):
        for name, (_, stored) in made.items():
            restored = layout.unpack(packed, name, expert)
            for field, tensor in vars(stored).items():
                other = getattr(restored, field)
                assert (other is None) == (tensor is None), (expert, name, field)
                if tensor is not None:
                    assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape), (expert, name, field)
                    assert torch.equal(other, tensor), (expert, name, field)
    return packed


GRID = [
    Experts(bits=bits, group=group, order=order, sym=False)
    for bits, group, order in product((2, 3, 4, 8), (-1, 16, 48, 32, 128), ORDERS)
]


@pytest.mark.parametrize("case", GRID, ids=str)
def test_round_trip(case: Experts):
    assert_restores(case, case.tensors())


STYLES = [
    Experts(style=style, concatenated=concatenated, activation=activation, order=order, bias=bias, inner=inner)
    for (style, concatenated), activation, order, bias, inner in product(
        (("gate and up", True), ("gate and up", False), ("gate_up", True), ("gate_up", False), ("up", True)),
        ("relu2", "unknown"),
        ("none", "some", "apart"),
        (False, True),
        (40, 160),
    )
]


@pytest.mark.parametrize("case", STYLES, ids=str)
def test_names_and_forms(case: Experts):
    assert_restores(case, case.tensors())


def test_dtypes_may_differ_among_experts():
    case = Experts(bias=True)
    tensors = case.tensors()
    shape, stored = tensors[1]["up_proj"]
    assert stored.g_idx is not None
    assert stored.bias is not None
    other = replace(stored, scales=stored.scales.bfloat16(), bias=stored.bias.float(), g_idx=stored.g_idx.long())
    tensors[1]["up_proj"] = (shape, other)
    assert_restores(case, tensors)


def test_padding_written_by_the_checkpoint_survives(monkeypatch: pytest.MonkeyPatch):
    """Stored 64 x 64, the model's own sizes 60 x 60."""
    stored_sizes = Experts(hidden=64, inner=64, sym=False, bias=True)
    tensors = stored_sizes.tensors()
    spec_of = Shape.spec

    def smaller(shape: Shape):
        return replace(spec_of(shape), in_features=60, out_features=60)

    monkeypatch.setattr(Shape, "spec", smaller)
    assert_restores(replace(stored_sizes, inner=60, hidden=60), tensors)


def test_uneven_groups_are_padded_to_the_longest_expert():
    case = Experts(hidden=128, group=32)
    tensors = case.tensors()
    uneven = torch.tensor([0] * 70 + [1] + [3] * 57, dtype=torch.int32)[torch.randperm(128)]
    for name in ("gate_proj", "up_proj"):
        shape, stored = tensors[2][name]
        tensors[2][name] = (shape, replace(stored, g_idx=uneven))
    packed = assert_restores(case, tensors)
    assert packed["tiled_up_scales"].shape[1] == packed["tiled_up_codes"].shape[2] * 8


def test_gate_and_up_interleave_where_they_share_their_order():
    for order in ("none", "all", "some"):
        assert "tiled_up_columns" in packed_and_spec(Experts(order=order), Experts(order=order).tensors())[0]
    apart = packed_and_spec(Experts(order="apart"), Experts(order="apart").tensors())[0]
    assert "tiled_up_columns" not in apart
    assert apart["tiled_up_order"].shape[1] == 2


def test_the_order_of_down_costs_nothing_if_fused():
    case = Experts(order="all")
    packed, layout = packed_and_spec(case, case.tensors())
    assert "tiled_down_order" not in packed
    g_idx = case.tensors()[1]["down_proj"][1].g_idx
    gate_rows = packed["tiled_up_columns"][1].view(-1, 2, 8)[:, 0].flatten()
    groups = g_idx[gate_rows[gate_rows < layout.rows.intermediate].long()]
    assert (groups.diff() >= 0).all()


def test_a_symmetric_layer_keeps_no_zero_points_for_the_kernels():
    assert "tiled_up_zeros" not in packed_and_spec(Experts(), Experts().tensors())[0]
    case = Experts(sym=False)
    packed = packed_and_spec(case, case.tensors())[0]
    assert packed["tiled_up_zeros"].nbytes == 2 * packed["tiled_up_scales"].numel()


def test_three_bit_codes_take_three_bits():
    case = Experts(bits=3, hidden=256, inner=256, group=-1, order="none", count=2)
    packed = packed_and_spec(case, case.tensors())[0]
    assert packed["tiled_up_codes"].nbytes + packed["tiled_up_high"].nbytes == 2 * 512 * 256 * 3 // 8
