"""Specs and headers of tensors that exist only in memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from graftq.plugin.checkpoint.headers import TensorInfo, torch_dtypes
from graftq.plugin.checkpoint.validation import Declared, spec_from_headers
from graftq.plugin.checkpoint.values import check_values
from graftq.quant_linear.spec import QuantSpec
from support.gptq import Recipe

NAMES = {dtype: name for name, dtype in torch_dtypes().items()}


def declared_by(recipe: Recipe) -> Declared:
    """What a checkpoint of that recipe declares."""
    offset = 0 if recipe.checkpoint_format == "gptq_v2" else 1
    return Declared(recipe.bits, recipe.group_size, recipe.desc_act, recipe.sym, offset)


def infos_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, TensorInfo]:
    """The headers that a file with these tensors of a module ``m`` would have."""
    return {
        suffix: TensorInfo(f"m.{suffix}", "f.safetensors", tuple(tensor.shape), NAMES[tensor.dtype], tensor.nbytes)
        for suffix, tensor in tensors.items()
    }


def spec_of(
    tensors: Mapping[str, torch.Tensor],
    recipe: Recipe,
    in_features: int | None = None,
    out_features: int | None = None,
    has_bias: bool = False,
) -> QuantSpec:
    """The spec that loading would arrive at; raises what loading would raise."""
    declared, infos = declared_by(recipe), infos_of(tensors)
    spec = spec_from_headers("m", infos, declared, in_features, out_features, has_bias)
    return check_values("m", infos, spec, declared, tensors)
