"""What is cut off a projection must be zero; a wrong size in a configuration looks like padding, and is not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.gptq import Recipe, quantize
from support.specs import spec_of

from graftq.quant_linear.errors import CheckpointError
from graftq.quant_linear.packing import pack_codes, unpack_codes
from graftq.quant_linear.spec import SUPPORTED_BITS

K, N = 96, 64


def made(recipe: Recipe) -> dict[str, torch.Tensor]:
    return quantize(torch.randn(N, K), recipe, np.random.default_rng(0))[0]


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("desc_act", [True, False])
@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_real_weights_are_not_padding(bits: int, desc_act: bool, sym: bool) -> None:
    recipe = Recipe(bits, desc_act=desc_act, sym=sym)
    tensors = made(recipe)
    with pytest.raises(CheckpointError, match="weights that are not zero for 64 outputs, the layer has 48"):
        spec_of(tensors, recipe, K, 48)
    with pytest.raises(CheckpointError, match="weights that are not zero for 96 inputs, the layer has 95"):
        spec_of(tensors, recipe, K - 1, N)


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_outputs_without_scales(bits: int) -> None:
    recipe = Recipe(bits)
    tensors = made(recipe)
    tensors["scales"][:, 48:] = 0
    assert spec_of(tensors, recipe, K, 48).padded_out == N
    tensors["scales"][2, 63] = 1
    with pytest.raises(CheckpointError, match="the layer has 48"):
        spec_of(tensors, recipe, K, 48)


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@pytest.mark.parametrize("code", [0, "the zero point"])
def test_inputs_without_weights(code: object, bits: int) -> None:
    recipe = Recipe(bits)
    tensors = made(recipe)
    codes = unpack_codes(tensors["qweight"], bits, K)
    codes[90:] = 0 if code == 0 else 2 ** (bits - 1)
    tensors["qweight"] = pack_codes(codes, bits)
    assert spec_of(tensors, recipe, 90, N).padded_in == K
    codes[95, 3] = 2**bits - 1
    tensors["qweight"] = pack_codes(codes, bits)
    with pytest.raises(CheckpointError, match="the layer has 90"):
        spec_of(tensors, recipe, 90, N)


def test_a_bias_beyond_the_outputs() -> None:
    recipe = Recipe()
    tensors = made(recipe)
    tensors["scales"][:, 48:] = 0
    tensors["bias"] = torch.zeros(N)
    assert spec_of(tensors, recipe, K, 48, has_bias=True).stored_bias == N
    tensors["bias"][50] = 1
    with pytest.raises(CheckpointError, match=r"m\.bias: non-zero bias beyond the layer's 48 outputs"):
        spec_of(tensors, recipe, K, 48, has_bias=True)
