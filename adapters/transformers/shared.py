"""What the adapters of transformers 4 and 5 have in common; imports nothing that only one of them has."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers.utils.quantization_config import GPTQConfig as StockConfig

from graftq.plugin.manager import choose_kernel
from graftq.quant_linear.checkpoint import TensorInfo, torch_dtypes
from graftq.quant_linear.experts import QuantExperts
from graftq.quant_linear.linear import QuantLinear
from graftq.quant_linear.spec import QuantSpec


class GPTQConfig(StockConfig):
    """The stock configuration, without what only matters to quantising; saved as it was read.

    Bears the stock name because transformers compares the names of the classes that it merges.
    """

    def __init__(self, bits: int, **kwargs: Any):
        self._read = {"bits": bits, **kwargs}
        super().__init__(bits, **{key: value for key, value in kwargs.items() if value is not None})
        self.dynamic = kwargs.get("dynamic")

    def to_dict(self) -> dict[str, Any]:
        """The parameters that were read, all of them and no others, unless this is to quantise."""
        if self.dataset is not None:
            whole = super().to_dict()
            del whole["_read"]
            return whole
        read = {**copy.deepcopy(self._read), "quant_method": "gptq"}
        if "model_file_base_name" in read:
            read["model_file_base_name"] = "model"  # what transformers calls the weights that it saves
        read.pop("model_basename", None)
        return read

    def complete(self, specs: Iterable[QuantSpec]) -> None:
        """State what the files leave to be seen from their tensors, where all of them show the same."""
        specs = list(specs)
        seen: dict[str, set[Any]] = {
            "group_size": {-1 if spec.num_groups == 1 else spec.group_size for spec in specs},
            "desc_act": {any(spec.desc_act for spec in specs)},
            "sym": {all(spec.sym for spec in specs)},
        }
        for key, values in seen.items():
            if self._read.get(key) is None and len(values) == 1:
                self._read[key] = values.pop()
                setattr(self, key, self._read[key])

    def post_init(self) -> None:
        """Check what quantising needs only if this is to quantise; loading is checked by :class:`QuantConfig`."""
        if self.dataset is not None:
            super().post_init()
        elif self.backend is None:
            self.backend = "auto"


def empty_linear(spec: QuantSpec, infos: Mapping[str, TensorInfo], dtype: torch.dtype) -> QuantLinear:
    """A layer on the meta device, with the dtypes that the files have; ``dtype`` is the model's."""
    known = torch_dtypes()
    dtypes = {suffix: known[info.dtype] for suffix, info in infos.items()}
    if not spec.has_bias:
        dtypes.pop("bias", None)
    return QuantLinear(spec, choose_kernel, dtypes, dtype, device="meta")


def packed_modules(model: nn.Module) -> Iterator[QuantLinear | QuantExperts]:
    """Packed layers, and packed experts as one each."""
    for child in model.children():
        if isinstance(child, (QuantLinear, QuantExperts)):
            yield child
        else:
            yield from packed_modules(child)


def bind(model: nn.Module, dtype: torch.dtype) -> None:
    """Choose kernels for packed layers and experts; those with offloaded weights keep the checkpoint's layout."""
    for module in packed_modules(model):
        layers = [layer for layer in module.modules() if isinstance(layer, QuantLinear)]
        packed = [tensor for layer in layers for tensor in layer.parameters()]
        for tensor in packed:
            tensor.requires_grad_(False)
        module.pinned = any(tensor.is_meta for tensor in packed)
        if not module.pinned:
            module.bind(packed[0].device.type, dtype)


def essential_prefixes(model: Any) -> tuple[str, ...]:
    """What the names of the base model's and its output embedding's parameters begin with; a new head's do not."""
    if model.base_model is model:
        return ("",)
    output = model.get_output_embeddings()
    heads = [name for name, module in model.named_modules() if module is output and output is not None]
    return tuple(f"{part}." for part in (model.base_model_prefix, *heads))
