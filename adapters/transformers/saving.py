"""What ``save_pretrained`` writes: the checkpoint's own tensors and names, whatever layout kernels have chosen."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import WeightRenaming

from graftq.adapters.transformers.offloaded import present
from graftq.adapters.transformers.overwriting import replacing, write_json
from graftq.adapters.transformers.packed_layers import plain_weight
from graftq.plugin.checkpoint.configuration import QUANTIZE_CONFIG, autogptq_stem
from graftq.quant_linear.experts import QuantExperts
from graftq.quant_linear.layouts import GptqTensors, Packed
from graftq.quant_linear.linear import QuantLinear
from graftq.quant_linear.packed_module import asking_for_state
from graftq.quant_linear.spec import QuantSpec


@dataclass
class Origin:
    """What is remembered of a checkpoint once it is loaded.

    Attributes:
        names: Tensors' names in the model, by their names in the files; only those that became a tensor
            unmerged with others.
        plain: The modules that packed ones replaced, without their weights, by name.
        idle_biases: Biases that only the files have, by name in the model: zeros, on the meta device.
        dequantized: What was packed in the files and is plain in the model, by module.
    """

    names: dict[str, str] = field(default_factory=dict)
    plain: dict[str, nn.Module] = field(default_factory=dict)
    idle_biases: dict[str, torch.Tensor] = field(default_factory=dict)
    dequantized: dict[str, tuple[GptqTensors, QuantSpec]] = field(default_factory=dict)

    def part(self, prefix: str) -> Origin:
        """What concerns the submodule called ``prefix``; its tensors are saved under transformers' names."""

        def inside(whole: Mapping[str, Any]) -> dict[str, Any]:
            start = f"{prefix}."
            return {name.removeprefix(start): value for name, value in whole.items() if name.startswith(start)}

        return replace(
            self,
            names={},
            plain=inside(self.plain),
            idle_biases=inside(self.idle_biases),
            dequantized=inside(self.dequantized),
        )


class StoredNames(WeightRenaming):
    """Names as in the files: looked up where they are known, else by the model's own renamings.

    transformers keeps a model's conversions after loading, and saves by what ``reverse_transform`` returns.
    """

    __slots__ = ("exact", "renamings")

    def __init__(self, exact: Mapping[str, str], renamings: list[Any]):
        super().__init__("", "")  # whole names are looked up; no pattern is matched
        self.exact = exact
        self.renamings = renamings

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """The new name, and the pattern that matched, if one did."""
        if source_key in self.exact:
            return self.exact[source_key], None
        renamed, pattern = source_key, None
        for renaming in self.renamings:
            renamed, found = renaming.rename_source_key(renamed)
            pattern = found or pattern
        return renamed, pattern

    def reverse_transform(self) -> StoredNames:
        """The inverse."""
        exact = {target: source for source, target in self.exact.items()}
        return StoredNames(exact, [renaming.reverse_transform() for renaming in self.renamings[::-1]])


def is_packed(model: nn.Module, origin: Origin | None = None) -> bool:
    """Whether a model has packed layers, or what the files of ``origin`` have packed."""
    layers = any(isinstance(module, (QuantLinear, QuantExperts)) for module in model.modules())
    return layers or (origin is not None and bool(origin.dequantized))


@contextmanager
def without_label(model: Any) -> Iterator[None]:
    """Let a float model that was made by a packed one's configuration be saved as what it is.

    Its configuration, which it may share with the packed one, is replaced by a copy as long as this lasts.
    """
    own = model.config
    model.config = copy.deepcopy(own)
    for holder in (model.config, model.config.get_text_config(decoder=True)):
        if getattr(holder, "quantization_config", None) is not None:
            del holder.quantization_config
    try:
        yield
    finally:
        model.config = own


def checkpoint_state(model: Any, origin: Origin) -> dict[str, torch.Tensor]:
    """The model's state dict, with packed weights as the checkpoint stores them, by their names in the model.

    Packed tensors are on the CPU, except for offloaded ones, which are on the meta device.

    Raises:
        ValueError: if a packed layer is not where it was loaded, or the configuration does not say it is packed.
    """
    if getattr(model.config, "quantization_config", None) is None and is_packed(model, origin):
        raise ValueError("config.quantization_config is gone, and without it the packed weights cannot be loaded again")
    with asking_for_state():
        state = dict(model.state_dict())
    stored: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, (QuantLinear, QuantExperts)):
            continue
        if not _is_in_place(name, origin):
            advice = (
                "it was added, copied or moved after loading: dequantize() the model first, then change and save it"
            )
            if ".base_layer" in f".{name}":
                advice = "an adapter surrounds it: save that, or unload() it first"
            raise ValueError(
                f"{name} is not where it was loaded, so nothing that loads the model would find it; {advice}"
            )
        packed = present(model, name, module)
        for own in packed:
            del state[f"{name}.{own}"]
        if packed:
            stored.update(_unpacked(name, module, packed))
    stored.update((name, torch.zeros_like(bias, device="cpu")) for name, bias in origin.idle_biases.items())
    for name, (tensors, spec) in origin.dequantized.items():
        if _equals(model, f"{name}.weight", plain_weight(model.get_submodule(name), tensors, spec)):
            del state[f"{name}.weight"]
            stored.update(_named(name, tensors))
    return state | _own_storage(stored)


def _is_in_place(name: str, origin: Origin) -> bool:
    container = re.sub(r"\.\d+\.\w+$", "", name)  # of one expert's projection
    return name in origin.plain or container in origin.plain


def _unpacked(name: str, module: QuantLinear | QuantExperts, packed: Packed) -> dict[str, torch.Tensor]:
    if isinstance(module, QuantLinear):
        return _named(name, module.layout.unpack(packed))
    found: dict[str, torch.Tensor] = {}
    for expert in range(module.num_experts):
        for own in module.spec.names:
            found.update(_named(f"{name}.{expert}.{own}", module.layout.unpack(packed, own, expert)))
    return found


def _named(module: str, tensors: GptqTensors) -> dict[str, torch.Tensor]:
    return {
        f"{module}.{suffix}": tensor if tensor.is_meta else tensor.detach().cpu()
        for suffix, tensor in vars(tensors).items()
        if tensor is not None
    }


def _equals(model: Any, name: str, weight: torch.Tensor) -> bool:
    """Whether a parameter still has the value that it was loaded with; training may have changed it."""
    from transformers.integrations.accelerate import load_offloaded_parameter

    parameter = model.get_parameter(name)
    if parameter.is_meta:
        parameter = load_offloaded_parameter(model, name)
    return torch.equal(parameter.cpu(), weight.to(parameter.dtype))


def _own_storage(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copy what shares memory: transformers would take it for tied weights, and keep one name of several."""
    taken: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        place = 0 if tensor.is_meta else tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if place in taken else tensor
        taken.add(place or id(tensor))
    return found


def write_parameters(parameters: Mapping[str, Any], folder: str | Path) -> None:
    """Write ``quantize_config.json``."""
    write_json(Path(folder, QUANTIZE_CONFIG), parameters)


def save_quantized(model: Any, folder: str | Path, **arguments: Any) -> None:
    """``model.save_pretrained(folder, ...)``, with the weights in files that bear AutoGPTQ's names.

    That is ``gptq_model-{bits}bit-{group_size}g.safetensors``, or as many numbered files and their index.

    Args:
        model: A model loaded by graftq.
        folder: Where to write.
        arguments: What ``save_pretrained`` takes, but for ``push_to_hub`` and ``variant``.

    Raises:
        ValueError: if asked to upload, or to name the files otherwise.
    """
    if arguments.get("push_to_hub") or arguments.get("variant"):
        raise ValueError("save_quantized() names the files itself, and uploads nothing")
    if not arguments.get("is_main_process", True):
        model.save_pretrained(folder, **arguments)  # writes nothing
        return
    with replacing(Path(folder)) as staged:
        model.save_pretrained(staged, **arguments)
        _rename_weights(staged)


def _rename_weights(folder: Path) -> None:
    """Give transformers' weight files AutoGPTQ's names, and say so in ``quantize_config.json``."""
    parameters = json.loads((folder / QUANTIZE_CONFIG).read_text(encoding="utf-8"))
    stem = autogptq_stem(parameters["bits"], parameters.get("group_size", -1))
    for path in folder.glob("model*.safetensors"):
        path.replace(folder / _renamed(path.name, stem))
    index = folder / "model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text(encoding="utf-8"))
        content["weight_map"] = {name: _renamed(file, stem) for name, file in content["weight_map"].items()}
        write_json(folder / _renamed(index.name, stem), content)
        index.unlink()
    write_json(folder / QUANTIZE_CONFIG, {**parameters, "model_file_base_name": stem})


def _renamed(file: str, stem: str) -> str:
    return stem + file.removeprefix("model")
