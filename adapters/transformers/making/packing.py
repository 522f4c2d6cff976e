"""Turns a model that was quantized in memory into a packed one, as if it had been loaded from its files."""

from __future__ import annotations

from typing import Any

from graftq.adapters.transformers.making.engine import Made
from graftq.adapters.transformers.making.model import ModelResult
from graftq.adapters.transformers.packed_layers import PlacedProjection
from graftq.adapters.transformers.placement import Placement
from graftq.adapters.transformers.quantizer import GptqHfQuantizer
from graftq.adapters.transformers.registry import GPTQConfig
from graftq.plugin.checkpoint.headers import info_of


def pack_model(model: Any, result: ModelResult) -> None:
    """Put packed layers in the place of those that were quantized; the model then runs and saves like a loaded one."""
    plan = Placement({one.target: _placed(stored, one) for stored, one in result.made.items()})
    config = GPTQConfig(**{key: value for key, value in result.parameters.items() if key != "quant_method"})
    tensors = {}
    for one in result.made.values():
        device = next(model.get_submodule(one.container or one.target).parameters()).device
        tensors[one.target] = {
            suffix: tensor.to(device) for suffix, tensor in vars(one.tensors).items() if tensor is not None
        }
    quantizer: Any = GptqHfQuantizer(config, pre_quantized=True)
    model.config.quantization_config = config
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = config.quant_method
    quantizer.adopt(model, plan, tensors)


def _placed(stored: str, one: Made) -> PlacedProjection:
    infos = {
        suffix: info_of(f"{stored}.{suffix}", tensor)
        for suffix, tensor in vars(one.tensors).items()
        if tensor is not None
    }
    return PlacedProjection(stored, infos, one.spec, one.container)
