"""graftq's ``HfQuantizer`` for transformers 4: what that calls, step by step, while it loads a GPTQ checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from graftq.adapters.transformers import loading
from graftq.adapters.transformers.packed_layers import (
    PlacedProjection,
    bind,
    check_all_values,
    features,
    idle_biases,
    ignore_prediction_layers,
    refuse_holes,
    refuse_unplaced,
)
from graftq.adapters.transformers.registry import DeferringQuantizer
from graftq.adapters.transformers.v4.experts import fuse_experts
from graftq.plugin.checkpoint.configuration import QuantConfig
from graftq.plugin.checkpoint.headers import CheckpointIndex, torch_dtypes
from graftq.plugin.checkpoint.unread import refuse_unread
from graftq.plugin.checkpoint.validation import spec_from_headers
from graftq.quant_linear.errors import CheckpointError


class GptqHfQuantizer(DeferringQuantizer):
    """Loads a GPTQ checkpoint: packed layers in place of the model's linear ones, before the weights come."""

    def __init__(self, quantization_config: Any, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        # Needed from the skeleton to the last weight, then dropped.
        self._plan: dict[str, PlacedProjection] = {}
        self._unplaced: list[str] = []
        self._index = CheckpointIndex({})

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is needed; but a model class called directly has its parameters read here."""
        current = loading.current()
        if current is not None and current.source is not None and current.config is None:
            where = current.source.describe("config.json")
            current.method = "gptq"
            current.config = QuantConfig.from_dict(self.quantization_config.to_dict(), where)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        current = loading.current()
        if current is None or current.index is None or current.config is None:
            raise CheckpointError("a GPTQ model is loaded from files; from_pretrained(state_dict=...) is not supported")
        self._index = current.index
        self._place(model, current.config, current.arguments.get("key_mapping"))
        check_all_values(self._plan, self._index, current.config, model.dtype)
        for target, one in self._plan.items():
            model.set_submodule(target, one.empty(model.dtype))
        ignore_prediction_layers(model, self._index)
        idle = idle_biases(self._plan, model.base_model_prefix)
        model._keys_to_ignore_on_load_unexpected = [*(model._keys_to_ignore_on_load_unexpected or ()), *idle]

    def _place(self, model: Any, config: QuantConfig, key_mapping: Mapping[str, str] | None) -> None:
        """Find the linear layer that each projection is, by the names that transformers' loader will use."""
        names, prefix = list(self._index.tensors), model.base_model_prefix
        stored_base = bool(prefix) and any(name.startswith(prefix) for name in names)
        model_base = bool(prefix) and hasattr(model, prefix)
        renamed = model._get_key_renaming_mapping(
            names, key_mapping, stored_base and not model_base, model_base and not stored_base
        )
        modules = dict(model.named_modules())
        parameters = dict(model.named_parameters())
        for name in names:
            target = renamed.get(name, name)
            if target in parameters and parameters[target].is_floating_point():
                refuse_unread(self._index.tensors[name])
        for stored, infos in self._index.projections().items():
            first = next(iter(infos))
            target = renamed.get(f"{stored}.{first}", "").removesuffix(f".{first}")
            layer = modules.get(target)
            if not isinstance(layer, (nn.Linear, Conv1D)):
                self._unplaced.append(stored)
                continue
            spec = spec_from_headers(stored, infos, config.for_module(stored), *features(layer))
            self._plan[target] = PlacedProjection(stored, infos, spec)

    def update_missing_keys(self, model: Any, missing_keys: list[str], prefix: str) -> list[str]:
        """Raise where transformers would fill a hole in the model with random numbers and a warning.

        Raises:
            CheckpointError: naming the weight.
        """
        refuse_holes(model, missing_keys, self._index, self._unplaced)
        refuse_unplaced(model, self._unplaced, self._index)
        return missing_keys

    def update_unexpected_keys(self, model: Any, unexpected_keys: list[str], prefix: str | None = None) -> list[str]:
        """Keep quiet about the biases of zeros; newer versions pass no ``prefix``, and load what is not listed here."""
        if prefix is None:
            return unexpected_keys
        return [name for name in unexpected_keys if name.removesuffix(".bias") not in self._plan]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        self._restore_scales(model)
        dtype = model.dtype
        fuse_experts(model)
        bind(model, dtype)
        self._plan, self._unplaced, self._index = {}, [], CheckpointIndex({})

    def _restore_scales(self, model: Any) -> None:
        """Read those scales again that transformers has rounded to the model's dtype."""
        known = torch_dtypes()
        rounded = {}
        for target, one in self._plan.items():
            info, scales = one.infos["scales"], model.get_parameter(f"{target}.scales")
            if scales.dtype != known[info.dtype] and not scales.is_meta:
                rounded[info.name] = scales
        for name, tensor in self._index.read(rounded):
            rounded[name].data = tensor.to(rounded[name].device, copy=True)

    def is_serializable(self, safe_serialization: Any = None) -> bool:
        """Not yet: transformers refuses ``save_pretrained`` for these models."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Not yet."""
        return False
