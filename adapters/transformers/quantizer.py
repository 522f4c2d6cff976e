"""graftq's ``HfQuantizer``: what transformers calls, step by step, while it loads a GPTQ checkpoint."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.quantizers.base import HfQuantizer

from graftq.adapters.transformers import loading, tensor_parallel
from graftq.adapters.transformers.attention import mark_attention
from graftq.adapters.transformers.dequantizing import dequantize_model
from graftq.adapters.transformers.offloaded import bring_in
from graftq.adapters.transformers.packed_layers import (
    PlacedProjection,
    bind,
    ignore_prediction_layers,
    kept_dtype,
    packed_modules,
    refuse_holes,
    refuse_unplaced,
)
from graftq.adapters.transformers.placement import Placement, place_projections
from graftq.adapters.transformers.registry import DeferringQuantizer
from graftq.adapters.transformers.saving import Origin, StoredNames, checkpoint_state, is_packed
from graftq.adapters.transformers.swap import Dequantize, swap_modules
from graftq.plugin.checkpoint.configuration import QuantConfig
from graftq.plugin.checkpoint.headers import CheckpointIndex, torch_dtypes
from graftq.plugin.checkpoint.unread import refuse_unread
from graftq.quant_linear.errors import CheckpointError


class GptqHfQuantizer(DeferringQuantizer):
    """Loads a GPTQ checkpoint: packed layers in place of the model's, before the weights come."""

    def __init__(self, quantization_config: Any, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        # Needed from the skeleton to the last weight, then dropped.
        self._model: Any = None
        self._plan = Placement()
        self._index = CheckpointIndex({})
        self._dense: dict[str, PlacedProjection] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._ignore_mismatched_sizes = False
        self._on_kernels = False
        # Needed for saving and dequantizing.
        self._origin = Origin()
        self._is_distributed = False

    @classmethod
    def to_quantize(cls, quantization_config: Any, **kwargs: Any) -> HfQuantizer:
        """graftq's own; the stock class for a configuration that names a backend, as only GPTQModel has any."""
        from graftq.adapters.transformers.making.door import MakingQuantizer  # which makes models of this class

        if getattr(quantization_config, "backend", None) not in (None, "auto"):
            return super().to_quantize(quantization_config, **kwargs)
        return MakingQuantizer(quantization_config, **kwargs)

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> None:
        current = loading.current()
        config = current.config if current and current.config else self._own_config()
        if current is not None and current.index is not None:
            self._index = current.index
        elif checkpoint_files:
            self._index = CheckpointIndex.open(checkpoint_files)
        else:
            raise CheckpointError("a GPTQ model is loaded from files; from_pretrained(state_dict=...) is not supported")
        arguments = current.arguments if current else {}
        key_mapping = arguments.get("key_mapping")
        self._ignore_mismatched_sizes = bool(arguments.get("ignore_mismatched_sizes"))
        self._model = model
        self._plan = place_projections(model, self._index, config, get_model_conversion_mapping(model, key_mapping))
        self._origin = Origin()
        ignore_prediction_layers(model, self._index)
        self._dense = swap_modules(model, self._plan, self._origin.plain)
        parameters: Any = self.quantization_config
        parameters.complete(projection.spec for projection in self._plan.projections.values())
        self._dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        tensor_parallel.keep_whole(model)

    def _own_config(self) -> QuantConfig:
        return QuantConfig.from_dict(self.quantization_config.to_dict(), "quantization_config")

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """Add the names of experts' packed tensors, and the modules to be dequantized, to the model's own mapping."""
        extended = [*weight_conversions]
        extended += [WeightRenaming(source, target) for source, target in self._plan.renamings.items()]
        extended += self._dense_converters()
        missing = self._missing(extended)
        self._spare_initialization(missing)
        return extended

    def _dense_converters(self) -> list[WeightConverter]:
        specs = {target: projection.spec for target, projection in self._dense.items()}
        tails: dict[str, set[str]] = {}
        for target, projection in self._dense.items():
            # The loader makes one converter per layer out of one pattern; it names the module below the layer.
            tail = re.split(r"\d+", target)[-1]
            tails.setdefault(tail, set()).update(projection.infos)
        return [
            WeightConverter(
                [re.escape(f"{tail}.{suffix}") + "$" for suffix in sorted(suffixes)],
                f"{tail}.weight",
                [Dequantize(specs, self._origin.dequantized, self)],
            )
            for tail, suffixes in tails.items()
        ]

    def _missing(self, conversions: list[Any]) -> set[str]:
        """Parameters that no tensor of the files becomes; only a new head may be among them.

        Raises:
            CheckpointError: where transformers would fill a hole in the model with random numbers and a warning.
        """
        model = self._model
        expected = model.state_dict()
        renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
        targets = {source: entry.target_patterns for entry in converters for source in entry.source_patterns}
        found: set[str] = set()
        packed = {info.name for infos in self._index.projections().values() for info in infos.values()}
        for name in self._index.tensors:
            renamed, source = rename_source_key(name, renamings, converters, model.base_model_prefix, expected)
            if renamed not in expected and name in expected:
                renamed, source = name, None  # the loader's own fallback, for mappings that rename too much
            if source is None and renamed in expected:
                self._check_like(name, expected[renamed])
                self._origin.names[name] = renamed
            patterns = targets.get(source, [""]) if source else [""]
            becomes = [renamed.replace(patterns[0], pattern) for pattern in patterns]
            if source is not None and name not in packed and becomes[0] in expected:
                self._check_dtype(name, expected[becomes[0]])
            found.update(becomes)
        missing = expected.keys() - found - model.all_tied_weights_keys.keys()
        refuse_holes(model, sorted(missing), self._index, self._plan.unplaced)
        refuse_unplaced(model, self._plan.unplaced, self._index)
        return missing

    def _check_like(self, name: str, parameter: torch.Tensor) -> None:
        """Hold a tensor of the files against the parameter that it becomes."""
        info = self._index.tensors[name]
        if info.shape != tuple(parameter.shape) and not self._ignore_mismatched_sizes:
            reason = f"shape {list(info.shape)}, but the model's weight has {list(parameter.shape)}"
            raise CheckpointError(reason, file=info.file, module=name)
        self._check_dtype(name, parameter)

    def _check_dtype(self, name: str, parameter: torch.Tensor) -> None:
        if parameter.is_floating_point():
            refuse_unread(self._index.tensors[name])

    def _spare_initialization(self, missing: set[str]) -> None:
        """Keep ``_init_weights`` away from modules that hold packed layers.

        transformers calls it for every module, and some models reach into their children's ``weight`` there.
        """
        holders = {
            name[:end]
            for name in (f"{target}." for target in self._plan.projections if target not in self._dense)
            for end in [position for position, letter in enumerate(name) if letter == "."]
        }
        for name in holders:
            module = self._model.get_submodule(name)
            own = [f"{name}.{own}" for own, _ in module.named_parameters(recurse=False)]
            if not missing.intersection(own) and not list(module.buffers(recurse=False)):
                module._is_hf_initialized = True

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        self._restore_dtypes(model)
        self._is_distributed = tensor_parallel.shard(model)
        bind(model, model.config.dtype or model.dtype)  # a configuration made by hand states none
        mark_attention(model)
        self._on_kernels = all(module.kernel not in (None, "torch") for module in packed_modules(model))
        self._remember_origin(model)
        self._model, self._plan, self._index = None, Placement(), CheckpointIndex({})
        self._dense, self._dtypes = {}, {}
        self._give_to_parts(model)

    def adopt(self, model: Any, plan: Placement, tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Take a float model over, as if it had been loaded packed.

        Args:
            model: The model; what the plan names is replaced, and its weights are let go.
            plan: What goes where, under which stored names.
            tensors: The packed tensors of each target, by suffix, on its device.
        """
        if getattr(model, "_weight_conversions", None) is None:
            model._weight_conversions = get_model_conversion_mapping(model, add_legacy=False)
        self._plan = plan
        swap_modules(model, plan, self._origin.plain)
        for stock in self._origin.plain.values():
            for name, parameter in stock.named_parameters(recurse=False):
                setattr(stock, name, torch.nn.Parameter(parameter.to("meta"), requires_grad=False))
        for target, packed in tensors.items():
            model.get_submodule(target).hold(packed)
        self._process_model_after_weight_loading(model)

    def _restore_dtypes(self, model: Any) -> None:
        """Cast what is not in the dtype of the skeleton: transformers 5.16 leaves renamed tensors in the file's.

        Packed tensors have the files' dtypes there; in a module that is kept in float32, transformers has widened them.
        Offloaded weights are cast when they are brought in, to the dtype of what stands in for them.
        """
        kept = model._get_dtype_plan(model.config.dtype)  # what a model keeps in float32, whatever its dtype
        packed = {f"{target}.{suffix}" for target, one in self._plan.projections.items() for suffix in one.infos}
        for name, parameter in model.named_parameters():
            wanted = self._dtypes.get(name, parameter.dtype)
            if name not in packed:
                wanted = kept_dtype(kept, name) or wanted
            if parameter.is_floating_point() and parameter.dtype != wanted:
                parameter.data = parameter.data.to(wanted)

    def _remember_origin(self, model: Any) -> None:
        """Put what saving needs where transformers looks for it."""
        known = torch_dtypes()
        for target, projection in self._plan.projections.items():
            for suffix, info in projection.infos.items():
                self._origin.names[info.name] = f"{target}.{suffix}"
            if projection.has_idle_bias:
                info = projection.infos["bias"]
                bias = torch.empty(info.shape, dtype=known[info.dtype], device="meta")
                self._origin.idle_biases[f"{target}.bias"] = bias
        kept = [entry for entry in model._weight_conversions if not self._is_own(entry)]
        renamings = [entry for entry in kept if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in kept if isinstance(entry, WeightConverter)]
        model._weight_conversions = [StoredNames(self._origin.names, renamings), *converters]

    def _give_to_parts(self, model: Any) -> None:
        """Let the models inside this one be saved alone, each by a quantizer of its own.

        These are copies, so this one must not hold the model any more: with a cycle, ``del model`` would free nothing.
        """
        from transformers.modeling_utils import PreTrainedModel  # which imports this module

        for name, part in model.named_modules():
            if name and isinstance(part, PreTrainedModel) and is_packed(part):
                own: Any = copy.copy(self)
                own._origin = self._origin.part(name)
                part.hf_quantizer = own

    def _is_own(self, conversion: Any) -> bool:
        if isinstance(conversion, WeightConverter):
            return any(isinstance(operation, Dequantize) for operation in conversion.operations)
        return conversion._original_source_patterns[0] in self._plan.renamings

    def is_serializable(self) -> bool:
        """What was loaded can be saved, whatever its kernels have made of it."""
        return True

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor] | None, dict[str, str]]:
        """What ``save_pretrained`` is to write, by the names in the model; None if it is to write adapters alone."""
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}
        self._check_whole("saved")
        return checkpoint_state(model, self._origin), {}

    def whole_state(self, model: Any) -> dict[str, torch.Tensor]:
        """What :meth:`get_state_dict_and_metadata` gives, and all of it in memory, offloaded tensors too."""
        self._check_whole("saved")
        state = checkpoint_state(model, self._origin)
        return {name: bring_in(model, name, tensor) if tensor.is_meta else tensor for name, tensor in state.items()}

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        self._check_whole("dequantized")
        return dequantize_model(model, self._origin, dtype)

    def _check_whole(self, what: str) -> None:
        if self._is_distributed:
            raise ValueError(
                f"a packed model that is distributed over processes cannot be {what}; load it in one of them"
            )

    @property
    def is_compileable(self) -> bool:
        """``generate`` with a static cache compiles by itself: kernels never wait for the device, the reference may."""
        return self._on_kernels

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained: the packed layers give gradients to what comes before them."""
        return True
