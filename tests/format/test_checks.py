"""Tensors that contradict themselves or their label are named, with the reason."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from support.gptq import Recipe, pack_stream, quantize
from support.specs import spec_of

from graftq.quant_linear.errors import CheckpointError
from graftq.quant_linear.spec import SUPPORTED_BITS

Tensors = dict[str, torch.Tensor]


def made(recipe: Recipe, n: int = 32, k: int = 96) -> Tensors:
    return quantize(torch.randn(n, k), recipe, np.random.default_rng())[0]


def set_group(value: int) -> Callable[[Tensors], object]:
    return lambda tensors: tensors["g_idx"].__setitem__(5, value)


BROKEN: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "g_idx too large": (set_group(3), "m.g_idx: group 3 out of range, there are 3 groups"),
    "g_idx negative": (set_group(-1), "m.g_idx: group -1 out of range"),
    "g_idx all zero under act-order": (lambda t: t["g_idx"].zero_(), "all zeros, but there are 3 groups"),
    "g_idx of another length": (lambda t: t.update(g_idx=t["g_idx"][:64]), r"m.g_idx: shape \[64\], expected \[96\]"),
    "NaN scale": (lambda t: t["scales"].__setitem__((0, 0), float("nan")), "m.scales|NaN values among the scales"),
    "infinite scale": (lambda t: t["scales"].__setitem__((0, 0), float("inf")), "infinite values among the scales"),
    "scales missing": (lambda t: t.pop("scales"), "f.safetensors: m: scales missing"),
    "qzeros missing": (lambda t: t.pop("qzeros"), "qzeros missing"),
    "qweight missing": (lambda t: t.pop("qweight"), "qweight missing"),
    "qweight int64": (lambda t: t.update(qweight=t["qweight"].long()), "m.qweight: dtype I64, expected I32"),
    "scales int32": (lambda t: t.update(scales=t["scales"].int()), "m.scales: dtype I32, expected F16 or BF16 or F32"),
    "qzeros of another width": (lambda t: t.update(qzeros=t["qzeros"][:, :2]), r"m.qzeros: shape \[3, 2\]"),
    "scales of another width": (lambda t: t.update(scales=t["scales"][:, :8]), r"m.scales: shape \[3, 8\]"),
    "qweight a vector": (lambda t: t.update(qweight=t["qweight"].flatten()), "is not GPTQ's"),
    "non-zero bias": (lambda t: t.update(bias=torch.ones(32).half()), "m.bias: non-zero bias"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_tensors(what: str) -> None:
    damage, message = BROKEN[what]
    tensors = made(Recipe())
    damage(tensors)
    with pytest.raises(CheckpointError, match=message):
        spec_of(tensors, Recipe(), 96, 32)


@pytest.mark.parametrize(
    ("bits", "label"), [(b, label) for b in SUPPORTED_BITS for label in SUPPORTED_BITS if b != label]
)
def test_bits_that_contradict_the_label(bits: int, label: int) -> None:
    with pytest.raises(CheckpointError, match=f"says {label} bits.*the tensors show {bits}"):
        spec_of(made(Recipe(bits)), Recipe(label), 96, 32)


def test_group_size_that_contradicts_the_label() -> None:
    with pytest.raises(CheckpointError, match="group_size 16, so 6 groups over K=96, but scales has 3 rows"):
        spec_of(made(Recipe(group_size=32)), Recipe(group_size=16), 96, 32)


@pytest.mark.parametrize(("stored", "label"), [("gptq", "gptq_v2"), ("gptq_v2", "gptq")])
def test_symmetric_zero_points_contradict_the_label(stored: str, label: str) -> None:
    with pytest.raises(CheckpointError, match=f"labeled {label}, but .* as {stored} stores them"):
        spec_of(made(Recipe(checkpoint_format=stored)), Recipe(checkpoint_format=label))


def test_varying_zero_points_contradict_sym() -> None:
    with pytest.raises(CheckpointError, match="labeled sym: true, but stored zero points range from"):
        spec_of(made(Recipe(sym=False)), Recipe(sym=True))


def test_bias_missing_where_the_model_has_one() -> None:
    with pytest.raises(CheckpointError, match="bias missing: the model's layer has one"):
        spec_of(made(Recipe()), Recipe(), has_bias=True)


@pytest.mark.parametrize("awq", [True, False], ids=["AWQ", "Marlin"])
def test_other_packings_behind_a_gptq_label(awq: bool) -> None:
    tensors = made(Recipe())
    shape = (96, 4) if awq else (6, 64)
    tensors["qweight"] = torch.zeros(shape, dtype=torch.int32)
    with pytest.raises(CheckpointError, match="AWQ" if awq else "Marlin"):
        spec_of(tensors, Recipe(), 96, 32)


@pytest.mark.parametrize("k", [40, 72, 100])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_ragged_k(bits: int, k: int) -> None:
    recipe = Recipe(bits, group_size=32)
    assert spec_of(made(recipe, k=k), recipe, k, 32).in_features == k


def test_padded_k_and_n() -> None:
    """GPTQModel pads both to the packing block; the padding is cut off again."""
    recipe = Recipe(sym=False, desc_act=False)
    tensors = made(recipe, n=32, k=96)
    tensors["scales"][:, 24:] = 0
    tensors["qweight"][-1] &= 0xFF  # 8 codes a word: of the last, those of rows 88 and 89 remain
    spec = spec_of(tensors, recipe, 90, 24)
    assert (spec.in_features, spec.padded_in, spec.out_features, spec.padded_out) == (90, 96, 24, 32)


def test_desc_act_is_what_g_idx_shows() -> None:
    recipe = Recipe(desc_act=False)
    tensors = made(recipe)
    assert not spec_of(tensors, Recipe(desc_act=True)).desc_act
    tensors["g_idx"] = tensors["g_idx"].flip(0)
    assert spec_of(tensors, recipe).desc_act


def test_symmetry_is_what_the_zero_points_show() -> None:
    recipe = Recipe(sym=False)
    tensors = made(recipe)
    tensors["qzeros"] = torch.from_numpy(pack_stream(np.full((32, 3), 7), 4).T.copy())
    assert spec_of(tensors, recipe).sym
