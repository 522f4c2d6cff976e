"""The bit stream and the formula, held against big integers and numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.gptq import Recipe, pack_stream, quantize
from support.specs import spec_of

from graftq.quant_linear.layouts import CheckpointLayout, GptqTensors
from graftq.quant_linear.packing import dequantize, pack_codes, unpack_codes, zero_points
from graftq.quant_linear.spec import SUPPORTED_BITS

COUNTS = (1, 31, 32, 33, 100, 256)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_pack_is_the_little_endian_stream(bits: int, count: int) -> None:
    codes = np.random.default_rng().integers(0, 2**bits, (count, 5))
    assert np.array_equal(pack_codes(torch.from_numpy(codes), bits).numpy(), pack_stream(codes, bits))


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_unpack_inverts_pack(bits: int, count: int) -> None:
    codes = torch.randint(0, 2**bits, (count, 7), dtype=torch.uint8)
    assert torch.equal(unpack_codes(pack_codes(codes, bits), bits, count), codes)


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_unpack_inverts_any_words(bits: int) -> None:
    words = torch.randint(-(2**31), 2**31, (3 * bits, 4), dtype=torch.int32)
    assert torch.equal(pack_codes(unpack_codes(words, bits, 96), bits), words)


@pytest.mark.parametrize("scales", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("desc_act", [True, False], ids=["act", "seq"])
@pytest.mark.parametrize("group_size", [-1, 16, 48])
@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_dequantize_is_exact(
    bits: int, group_size: int, desc_act: bool, sym: bool, checkpoint_format: str, scales: torch.dtype
) -> None:
    recipe = Recipe(bits, group_size, desc_act, sym, checkpoint_format, scales)
    tensors, expected = quantize(torch.randn(32, 96), recipe, np.random.default_rng())
    found = dequantize(GptqTensors(**tensors), spec_of(tensors, recipe))
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_unpacking_compiles_to_one_graph(bits: int) -> None:
    """The reference is what runs, under ``torch.compile`` too, where no kernel does."""
    torch.compiler.reset()  # lest numbers that differ from one call to the next become symbols
    codes = torch.randint(0, 2**bits, (64, 5), dtype=torch.uint8)
    compiled = torch.compile(unpack_codes, fullgraph=True, backend="eager")
    assert compiled(pack_codes(codes, bits), bits, 64).equal(codes)


def test_stored_zero_point_of_all_ones_means_two_to_the_bits() -> None:
    """AutoGPTQ adds one without masking: kept, because its kernels computed with it."""
    tensors, _ = quantize(torch.randn(8, 32), Recipe(), np.random.default_rng())
    tensors["qzeros"].fill_(-1)
    spec = spec_of(tensors, Recipe(sym=False))
    assert zero_points(GptqTensors(**tensors), spec).unique().tolist() == [16]


def test_checkpoint_layout_restores_every_tensor() -> None:
    tensors, _ = quantize(torch.randn(8, 32), Recipe(), np.random.default_rng())
    stored = GptqTensors(**tensors, bias=torch.randn(8))
    layout = CheckpointLayout(spec_of(tensors, Recipe()))
    restored = layout.unpack(layout.pack(stored))
    assert all(torch.equal(value, vars(restored)[name]) for name, value in vars(stored).items())
