"""``from_quantized``, and the object that it returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from graftq.adapters.auto_gptq.options import sort_out
from graftq.adapters.auto_gptq.quantize_config import BaseQuantizeConfig
from graftq.adapters.auto_gptq.quantizing import quantize
from graftq.plugin import import_hooks
from graftq.plugin.checkpoint.configuration import autogptq_stem, read_written
from graftq.plugin.checkpoint.headers import PICKLE_ENDINGS
from graftq.plugin.checkpoint.source import HUB_ARGUMENTS, Source


class BaseGPTQForCausalLM(nn.Module):
    """A model of transformers, with the few attributes that AutoGPTQ added; any other is the model's own.

    Attributes:
        model: The model.
        config: Its configuration.
        quantize_config: The checkpoint's quantization parameters.
        quantized: Whether it is; a model that is loaded to be quantized is not.
    """

    def __init__(self, model: Any, quantize_config: BaseQuantizeConfig):
        super().__init__()
        self.quantized = True
        self.model = model
        self.config = model.config
        self.model_type: str = model.config.model_type
        self.quantize_config = quantize_config

    @classmethod
    def from_quantized(
        cls,
        model_name_or_path: str | Path,
        device_map: str | dict[str, Any] | None = None,
        max_memory: dict[Any, Any] | None = None,
        device: str | int | torch.device | None = None,
        *,
        quantize_config: BaseQuantizeConfig | Mapping[str, Any] | None = None,
        model_basename: str | None = None,
        use_safetensors: bool = True,
        trust_remote_code: bool = False,
        torch_dtype: torch.dtype | str | None = None,
        checkpoint_format: str | None = None,
        **options: Any,
    ) -> BaseGPTQForCausalLM:
        """Load a GPTQ checkpoint by transformers' ``from_pretrained``, with all of graftq's checks.

        Args:
            model_name_or_path: A folder, or a repository of the Hub.
            device_map: As in transformers.
            max_memory: As in transformers.
            device: The one device for everything, if neither of these is given; without any, "auto".
            quantize_config: The parameters, instead of those in the checkpoint.
            model_basename: Name of the weight file without its ending, or of the index of its shards.
            use_safetensors: False allows pickles, and prefers them to safetensors of the same name.
            trust_remote_code: As in transformers.
            torch_dtype: The model's dtype; float16 if not given.
            checkpoint_format: The format, for a checkpoint that does not name it.
            **options: See :mod:`graftq.adapters.auto_gptq.options`.

        Raises:
            FileNotFoundError: if there is no file ``model_basename``.
            graftq.quant_linear.errors.CheckpointError: if the checkpoint cannot be loaded right.
            RuntimeError: if graftq is switched off, or has failed to take over transformers, or for transformers 4.
        """
        if int(transformers.__version__.partition(".")[0]) < 5:  # not all of these load a file by its name
            raise RuntimeError(f"transformers {transformers.__version__}: graftq's from_quantized needs 5.16 or newer")
        import_hooks.require("transformers.quantizers.auto", "transformers.modeling_utils")
        passed_on = sort_out(options)
        hub = {key: passed_on[key] for key in HUB_ARGUMENTS if key in passed_on}
        source = Source(str(model_name_or_path), hub)
        config = AutoConfig.from_pretrained(model_name_or_path, trust_remote_code=trust_remote_code, **hub)
        if quantize_config is None and checkpoint_format is None:
            parameters = BaseQuantizeConfig.from_pretrained(model_name_or_path, **hub)
        else:
            raw = _given(source, quantize_config, checkpoint_format)
            parameters = BaseQuantizeConfig.from_quant_config(raw)
            config.quantization_config = raw
        if name := _weight_file(source, model_basename, parameters, use_safetensors):
            config.transformers_weights = name
            parameters.model_file_base_name = Path(name.removesuffix(".index.json")).stem
        where = _device_map(device_map, device, max_memory)
        if max_memory is not None and not isinstance(where, dict):
            passed_on["max_memory"] = max_memory
        model = AutoModelForCausalLM.from_pretrained(
            model_name_or_path,
            config=config,
            device_map=where,
            trust_remote_code=trust_remote_code,
            use_safetensors=use_safetensors,
            **{"dtype": torch_dtype or torch.float16, **passed_on},
        )
        parameters.model_name_or_path = str(model_name_or_path)
        return cls(model, parameters).eval()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        quantize_config: BaseQuantizeConfig,
        max_memory: dict[Any, Any] | None = None,
        trust_remote_code: bool = False,
        torch_dtype: torch.dtype | str = torch.float16,
        **options: Any,
    ) -> BaseGPTQForCausalLM:
        """Load a float model, to be quantized by :meth:`quantize`.

        Args:
            pretrained_model_name_or_path: A folder or a repository of the Hub.
            quantize_config: How it will be quantized.
            max_memory: As in transformers.
            trust_remote_code: As in transformers.
            torch_dtype: The model's dtype.
            **options: See :mod:`graftq.adapters.auto_gptq.options`.

        Raises:
            RuntimeError: for transformers 4.
        """
        if int(transformers.__version__.partition(".")[0]) < 5:
            raise RuntimeError(f"transformers {transformers.__version__}: graftq quantizes with 5.16 or newer")
        arguments = sort_out(options)
        if max_memory is not None:
            arguments = {"device_map": "auto", "max_memory": max_memory, **arguments}
        model = AutoModelForCausalLM.from_pretrained(
            pretrained_model_name_or_path, trust_remote_code=trust_remote_code, dtype=torch_dtype, **arguments
        )
        made = cls(model.eval(), quantize_config)
        made.quantized = False
        return made

    def quantize(self, examples: Sequence[Any], batch_size: int = 1, **options: Any) -> None:
        """Quantize the model that :meth:`from_pretrained` has loaded.

        Args:
            examples: Mappings with ``input_ids`` and ``attention_mask``; padding does not count.
            batch_size: Rows that run at once, at least.
            **options: ``use_triton``, ``use_cuda_fp16``, ``autotune_warmup_after_quantized`` and
                ``cache_examples_on_gpu`` change nothing.

        Raises:
            RuntimeError: if it is quantized.
            ValueError: if the examples are none, or the model cannot be quantized.
        """
        if self.quantized:
            raise RuntimeError("this model is quantized")
        known = {"use_triton", "use_cuda_fp16", "autotune_warmup_after_quantized", "cache_examples_on_gpu"}
        if unknown := sorted(options.keys() - known):
            raise TypeError(f"quantize() has no argument {unknown[0]!r}")
        quantize(self.model, self.quantize_config, examples, batch_size)
        self.quantize_config.model_file_base_name = "model"
        self.quantized = True

    def save_quantized(self, save_dir: str | Path, use_safetensors: bool = True, **kwargs: Any) -> None:
        """Save the checkpoint by the model's ``save_pretrained``; AutoGPTQ finds its files by ``quantize_config.json``.

        Raises:
            ValueError: if asked to write pickles, or the model is not quantized yet.
        """
        if not use_safetensors:
            raise ValueError("graftq writes safetensors only")
        if not self.quantized:
            raise ValueError("this model is not quantized yet: call quantize(examples) first")
        self.model.save_pretrained(save_dir)

    @property
    def hf_device_map(self) -> dict[str, Any]:
        """Where the modules are; transformers itself has no map for a model in one place."""
        return getattr(self.model, "hf_device_map", None) or {"": _place(self.model.device)}

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        places = (place for place in self.hf_device_map.values() if place != "disk")
        return torch.device(next(places, self.model.device))

    def to(self, *args: Any, **kwargs: Any) -> BaseGPTQForCausalLM:
        """Move the model, by its own method."""
        self.model.to(*args, **kwargs)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model."""
        return self.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's ``generate``."""
        with torch.inference_mode():
            return self.model.generate(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # not there yet: in __init__, or while being copied
                raise
            return getattr(self.model, name)


class AutoGPTQForCausalLM:
    """AutoGPTQ's ways in: :meth:`from_quantized` and :meth:`from_pretrained`."""

    def __init__(self) -> None:
        raise OSError("AutoGPTQForCausalLM has no instances: use AutoGPTQForCausalLM.from_quantized(...)")

    @classmethod
    def from_quantized(cls, model_name_or_path: str | Path, *args: Any, **kwargs: Any) -> BaseGPTQForCausalLM:
        """:meth:`BaseGPTQForCausalLM.from_quantized`."""
        return BaseGPTQForCausalLM.from_quantized(model_name_or_path, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> BaseGPTQForCausalLM:
        """:meth:`BaseGPTQForCausalLM.from_pretrained`."""
        return BaseGPTQForCausalLM.from_pretrained(*args, **kwargs)


def _given(
    source: Source, quantize_config: BaseQuantizeConfig | Mapping[str, Any] | None, checkpoint_format: str | None
) -> dict[str, Any]:
    """The caller's parameters, in the form of ``config.json``'s ``quantization_config``.

    Raises:
        ValueError: if their format is not the checkpoint's own. Nothing but the format tells how zero points are
            stored, and a program that leaves it at its default does not mean to contradict.
    """
    written = read_written(source)
    if isinstance(quantize_config, BaseQuantizeConfig):
        raw = quantize_config.to_dict()
        if raw["sym"]:  # how to quantize, by default; AutoGPTQ takes the zero points from the file in any case
            del raw["sym"]
    else:
        raw = dict(quantize_config or next(iter(written.values()), {}))
    own = BaseQuantizeConfig.from_quant_config(raw, checkpoint_format).checkpoint_format
    for name, stated in written.items():
        BaseQuantizeConfig.from_quant_config({"checkpoint_format": own, **stated}, own, source.describe(name))
    return {**raw, "quant_method": "gptq", "checkpoint_format": own}


def _weight_file(
    source: Source, basename: str | None, parameters: BaseQuantizeConfig, use_safetensors: bool
) -> str | None:
    """The file that AutoGPTQ would take; None leaves the search to graftq.

    Raises:
        FileNotFoundError: if the one that the caller has named is not there.
    """
    named = basename or parameters.model_file_base_name
    stems = [named] if named else [autogptq_stem(parameters.bits, parameters.group_size), "model"]
    endings = (".safetensors.index.json", ".safetensors") if use_safetensors else PICKLE_ENDINGS
    tried = [stem + ending for stem in stems for ending in endings]
    found = next((name for name in tried if source.has(name)), None)
    if found is None and basename is not None:
        raise FileNotFoundError(f"{source.describe('')}: no {' or '.join(tried)}, as model_basename={basename!r} asks")
    return found


def _device_map(
    device_map: str | dict[str, Any] | None, device: str | int | torch.device | None, max_memory: object
) -> str | dict[str, Any]:
    """AutoGPTQ's order: a map, else one device, else "auto"."""
    if device_map:
        return device_map
    if device is None or max_memory:
        return "auto"
    return {"": device if isinstance(device, int) else _place(torch.device(device))}


def _place(device: torch.device) -> str | int:
    """A device as device maps name it."""
    return device.index if device.type == "cuda" and device.index is not None else str(device)
