"""``GPTQQuantizer.convert_model`` and ``post_init_model``: packed layers before, and checks after, the weights come.

Between the two calls the caller loads the weights himself, as a rule by accelerate.
"""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from graftq.plugin.checkpoint.configuration import QuantConfig
from graftq.plugin.checkpoint.headers import TensorInfo
from graftq.plugin.checkpoint.validation import Declared
from graftq.plugin.checkpoint.values import check_values
from graftq.plugin.manager import choose_kernel
from graftq.quant_linear.errors import CheckpointError
from graftq.quant_linear.layouts import CheckpointLayout
from graftq.quant_linear.linear import QuantLinear
from graftq.quant_linear.spec import QuantSpec

WITH_FILES = "load it with from_pretrained or optimum.gptq.load_quantized_model, which see the files"


def convert_model(self: Any, model: Any, **kwargs: Any) -> Any:
    """Put empty packed layers in the place of the linear layers that optimum would replace.

    Raises:
        NotImplementedError: for a mixture of experts: transformers fuses these, the files have them one by one.
    """
    from optimum.gptq import quantizer as optimum
    from transformers.pytorch_utils import Conv1D

    if self.block_name_to_quantize is None:
        self.block_name_to_quantize = optimum.get_block_name_with_pattern(model)
    for name, module in model.named_modules():
        if hasattr(module, "num_experts") and any(tensor.ndim == 3 for tensor in module.parameters(recurse=False)):
            raise NotImplementedError(f"{name}: convert_model cannot place the weights of experts; {WITH_FILES}")
    declared = _declared(self)
    endings = tuple(ending for group in self.modules_in_block_to_quantize or () for ending in group)
    for name, layer in optimum.get_layers(model, prefix=self.block_name_to_quantize).items():
        if endings and not name.endswith(endings):
            continue
        if not isinstance(layer, (nn.Linear, Conv1D)):
            raise NotImplementedError(f"{name}: GPTQ in a {type(layer).__name__}; {WITH_FILES}")
        n, k = layer.weight.shape[::-1] if isinstance(layer, Conv1D) else layer.weight.shape
        model.set_submodule(name, _empty(layer, n, k, declared))
    self.quant_linear = QuantLinear
    return model


def post_init_model(self: Any, model: Any) -> Any:
    """Check what was loaded, layer by layer, and choose the kernels.

    Raises:
        graftq.quant_linear.errors.CheckpointError: if a layer got no weights, or such as contradict the parameters.
    """
    declared = _declared(self)
    for name, layer in model.named_modules():
        if not isinstance(layer, QuantLinear):
            continue
        values = {suffix: _value(layer, suffix) for suffix in layer.packed()}
        if any(value is None for value in values.values()) or not (values["qweight"].any() or values["scales"].any()):
            raise CheckpointError("no weights were loaded into this layer", module=name)
        infos = {
            suffix: TensorInfo(f"{name}.{suffix}", "", tuple(value.shape), "", value.nbytes)
            for suffix, value in values.items()
        }
        spec = replace(layer.spec, desc_act=declared.desc_act and layer.spec.num_groups > 1)
        layer.spec = check_values(name, infos, spec, declared, values, layer.dtype)
        layer.layout = CheckpointLayout(layer.spec)
        layer.pinned = any(tensor.is_meta for tensor in layer.packed().values())
        if not layer.pinned:
            layer.bind(values["qweight"].device.type, layer.dtype)
    model.quantize_config = SimpleNamespace(desc_act=self.desc_act)
    return model


def _declared(quantizer: Any) -> Declared:
    raw = {name: getattr(quantizer, name) for name in ("bits", "group_size", "desc_act", "format")}
    # `sym` is a default of GPTQQuantizer's where the checkpoint does not state it.
    return QuantConfig.from_dict(raw, "GPTQQuantizer").declared


def _empty(layer: Any, n: int, k: int, declared: Declared) -> QuantLinear:
    """A layer without weights, where the old one is; floats in float32, which holds any scale exactly."""
    assert declared.bits is not None
    group_size = k if declared.group_size in (None, -1) else declared.group_size
    assert group_size is not None
    spec = QuantSpec(
        bits=declared.bits,
        in_features=k,
        out_features=n,
        group_size=group_size,
        num_groups=math.ceil(k / group_size),
        desc_act=True,
        sym=False,
        zero_offset=declared.zero_offset,
        padded_in=k,
        padded_out=n,
        stored_g_idx=k,
        stored_bias=0 if layer.bias is None else n,
    )
    dtypes = {"qweight": torch.int32, "qzeros": torch.int32, "g_idx": torch.int32}
    dtypes |= {"scales": torch.float32, "bias": torch.float32}
    packed = QuantLinear(spec, choose_kernel, dtypes, layer.weight.dtype, device=layer.weight.device)
    for tensor in packed.packed().values():
        tensor.zero_()
    return packed


def _value(layer: QuantLinear, suffix: str) -> Any:
    """A tensor of the layer, also where accelerate keeps it elsewhere; None if it is nowhere."""
    tensor = layer.packed()[suffix]
    if not tensor.is_meta:
        return tensor
    offloaded = getattr(getattr(layer, "_hf_hook", None), "weights_map", None)
    return offloaded[suffix] if offloaded is not None else None
