"""What loading with transformers 4 and with 5 has in common; imports nothing that only one of them has."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from graftq.adapters.transformers.joining import join_model_siblings
from graftq.plugin.checkpoint.configuration import QuantConfig
from graftq.plugin.checkpoint.headers import CheckpointIndex, TensorInfo, torch_dtypes
from graftq.plugin.checkpoint.padding import is_padded
from graftq.plugin.checkpoint.values import check_values
from graftq.plugin.manager import choose_kernel
from graftq.quant_linear.errors import CheckpointError
from graftq.quant_linear.experts import QuantExperts
from graftq.quant_linear.layouts import GptqTensors
from graftq.quant_linear.linear import QuantLinear
from graftq.quant_linear.packing import dequantize
from graftq.quant_linear.spec import QuantSpec

PREDICTION_LAYERS = re.compile(r"(^|\.)(mtp|nextn)(_\w+)?\.")
"""What layers for multi-token prediction are called where they do not follow the others."""

PREDICTION_INPUTS = r"(?:^|\.)layers\.(\d+)\.(?:eh_proj|enorm|hnorm)\."
"""Names that such a layer has where it follows the others, and no other layer."""


@dataclass(frozen=True)
class PlacedProjection:
    """A quantized projection of the files.

    Attributes:
        stored: Its name there.
        infos: Its tensors by suffix.
        spec: Its description.
        container: For an expert's projection, the module that runs all experts, where the model has one; otherwise "".
    """

    stored: str
    infos: Mapping[str, TensorInfo]
    spec: QuantSpec
    container: str = ""

    @property
    def has_idle_bias(self) -> bool:
        """Whether the files hold a bias that the model's layer has not: the checks have made sure that it is zeros."""
        return "bias" in self.infos and not self.spec.has_bias

    def empty(self, dtype: torch.dtype, kept: torch.dtype | None = None) -> QuantLinear:
        """A layer on the meta device, with the dtypes that the files have.

        Args:
            dtype: The model's.
            kept: Another in which the model wants this layer, if it does.
        """
        known = torch_dtypes()
        dtypes = {suffix: known[info.dtype] for suffix, info in self.infos.items()}
        if not self.spec.has_bias:
            dtypes.pop("bias", None)
        layer = QuantLinear(self.spec, choose_kernel, dtypes, kept or dtype, device="meta")
        layer.keeps_dtype = kept is not None
        return layer


def kept_dtype(plan: Mapping[str, torch.dtype], name: str) -> torch.dtype | None:
    """The dtype in which a model keeps the parameter ``name``, by transformers' plan, whatever its own; None if any."""
    found = [dtype for pattern, dtype in plan.items() if re.search(pattern.replace("*", ".*"), name)]
    return found[-1] if found else None


def features(layer: Any, columns: int = 0) -> tuple[int, int, bool]:
    """``(in_features, out_features, has_bias)`` of a linear layer, or of what has a weight like one.

    ``columns`` are those of an embedding's packed scales: GPTQModel packs it with its tokens as inputs.
    """
    is_turned = isinstance(layer, Conv1D) or is_by_token(layer, columns)
    n, k = layer.weight.shape[::-1] if is_turned else layer.weight.shape
    return k, n, getattr(layer, "bias", None) is not None


def is_by_token(layer: Any, columns: int) -> bool:
    """Whether an embedding is packed with its tokens as inputs, by the columns of its packed scales."""
    return isinstance(layer, nn.Embedding) and columns == layer.weight.shape[1]


def plain_weight(layer: Any, tensors: GptqTensors, spec: QuantSpec) -> torch.Tensor:
    """The float32 weight of a layer that is no linear one, dequantized, in that layer's own shape."""
    weight = dequantize(tensors, spec)
    return weight.T if is_by_token(layer, spec.out_features) else weight


def check_all_values(
    projections: dict[str, PlacedProjection], index: CheckpointIndex, config: QuantConfig, dtype: torch.dtype
) -> None:
    """Read the small tensors of all projections, check them, and complete the specs by what they say.

    Args:
        projections: By target; gets the completed specs.
        index: The files.
        config: The parameters.
        dtype: The model's.

    Raises:
        CheckpointError: naming file, module and reason.
    """
    padded = {target for target, one in projections.items() if is_padded(one.spec)}
    for target, values in index.read_small({target: one.infos for target, one in projections.items()}, padded):
        one = projections[target]
        spec = check_values(one.stored, one.infos, one.spec, config.for_module(one.stored), values, dtype)
        projections[target] = replace(one, spec=spec)


def idle_biases(projections: Mapping[str, PlacedProjection], base: str) -> set[str]:
    """Patterns for the biases that AutoGPTQ writes for every layer, in any layer, with or without the ``base`` prefix.

    They are for transformers' list of tensors that the files may have and the model has not.
    """
    names = [target.removeprefix(f"{base}.") for target, one in projections.items() if one.has_idle_bias]
    return {re.sub(r"\d+", r"\\d+", re.escape(name)) + r"\.bias$" for name in names}


def refuse_holes(model: Any, missing: Iterable[str], index: CheckpointIndex, unplaced: list[str]) -> None:
    """Raise where transformers would fill a hole in the model with random numbers and a warning.

    Args:
        model: The model.
        missing: Names of its weights that the files do not have; of a new head they may be.
        index: The files.
        unplaced: Packed projections for which the model has no place.

    Raises:
        CheckpointError: naming the weight.
    """
    essential, ignored = _essential_prefixes(model), model._keys_to_ignore_on_load_missing or ()
    for name in missing:
        if name.startswith(essential) and not any(re.search(pattern, name) for pattern in ignored):
            file = next(iter(index.tensors.values())).file if index.tensors else None
            lost = f"; packed tensors without a place: {', '.join(unplaced[:3])}" if unplaced else ""
            raise CheckpointError(f"no tensor in the checkpoint for this weight{lost}", file=file, module=name)


def ignore_prediction_layers(model: Any, index: CheckpointIndex) -> None:
    """Add layers for multi-token prediction to what the model ignores, where it has none and does not say so itself.

    Models name such layers for the sizes that were published. They are known by a name, or follow the last layer, as
    many as ``num_nextn_predict_layers``, and take what only they do: the embedding of the next token.
    """
    config = model.config.get_text_config(decoder=True)
    patterns = []
    if not any(PREDICTION_LAYERS.search(f"{name}.") for name, _ in model.named_modules()):
        patterns.append(PREDICTION_LAYERS.pattern)
    count, first = (getattr(config, key, None) or 0 for key in ("num_nextn_predict_layers", "num_hidden_layers"))
    if count:
        inputs = (re.search(PREDICTION_INPUTS, name) for name in index.tensors)
        numbers = {int(found[1]) for found in inputs if found} & set(range(first, first + count))
        patterns += [rf"(^|\.)layers\.{number}\." for number in sorted(numbers)]
    model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *patterns}


def refuse_unplaced(model: Any, unplaced: Iterable[str], index: CheckpointIndex) -> None:
    """Raise where packed layers of the files would be dropped without the model's own word for it.

    A model names what it ignores (layers for multi-token prediction, as a rule). One that is loaded as another class
    than the one it was saved by may lack a head, but no part of the base model.

    Raises:
        CheckpointError: naming the layer.
    """
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    architectures = getattr(model.config, "architectures", None)
    is_whole = isinstance(architectures, (list, tuple)) and type(model).__name__ in architectures
    prefix = f"{model.base_model_prefix}."
    parts = {name for name, _ in model.base_model.named_children()}
    for stored in unplaced:
        if any(re.search(pattern, f"{stored}.qweight") for pattern in ignored):
            continue
        if is_whole or stored.removeprefix(prefix).partition(".")[0] in parts:
            file = next(info.file for name, info in index.tensors.items() if name.startswith(f"{stored}."))
            raise CheckpointError("packed, but the model has no place for it", file=file, module=stored)


def _essential_prefixes(model: Any) -> tuple[str, ...]:
    """What the names of the base model's and its output embedding's parameters begin with; a new head's do not."""
    if model.base_model is model:
        return ("",)
    output = model.get_output_embeddings()
    heads = [name for name, module in model.named_modules() if module is output and output is not None]
    return tuple(f"{part}." for part in (model.base_model_prefix, *heads))


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
        packed = [tensor for layer in layers for tensor in layer.packed().values()]
        for tensor in packed:
            tensor.requires_grad_(False)
        module.pinned = any(tensor.is_meta for tensor in packed)
        if not module.pinned:
            module.bind(packed[0].device.type, module.dtype if module.keeps_dtype else dtype)
    join_model_siblings(model)
