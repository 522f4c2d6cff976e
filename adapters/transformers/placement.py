"""Which module of the model each quantized projection in the files belongs to.

The files decide what is quantized. Names go through the model's own conversion mapping first, so that
every renaming transformers knows is honored; experts' names are then derived from its converters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from graftq.adapters.transformers.packed_layers import PlacedProjection, check_all_values, features
from graftq.plugin.checkpoint.configuration import QuantConfig
from graftq.plugin.checkpoint.fields import is_index
from graftq.plugin.checkpoint.headers import SUFFIXES, CheckpointIndex, TensorInfo
from graftq.plugin.checkpoint.validation import spec_from_headers
from graftq.quant_linear.errors import CheckpointError

# Names that quantizers give to the projections of an expert, besides those in transformers' converters.
ALIASES = {
    "gate_proj": "gate_proj",
    "up_proj": "up_proj",
    "down_proj": "down_proj",
    "gate_up_proj": "gate_up_proj",
    "gate_up_projs": "gate_up_proj",
    "down_projs": "down_proj",
    "gate_up": "gate_up_proj",
    "down": "down_proj",
    "w1": "gate_proj",
    "w2": "down_proj",
    "w3": "up_proj",
}


@dataclass
class Placement:
    """What becomes of the quantized projections of one checkpoint in one model.

    Attributes:
        projections: All that have a place, by target.
        renamings: What transformers' loader needs, besides the model's own mapping, to follow.
        unplaced: Stored names without a place in this model.
    """

    projections: dict[str, PlacedProjection] = field(default_factory=dict)
    renamings: dict[str, str] = field(default_factory=dict)
    unplaced: list[str] = field(default_factory=list)

    def containers(self) -> dict[str, dict[str, PlacedProjection]]:
        """The projections of each experts module, by name relative to it (``3.gate_proj``)."""
        found: dict[str, dict[str, PlacedProjection]] = {}
        for target, projection in self.projections.items():
            if projection.container:
                found.setdefault(projection.container, {})[target[len(projection.container) + 1 :]] = projection
        return found


def place_projections(model: Any, index: CheckpointIndex, config: QuantConfig, conversions: Iterable[Any]) -> Placement:
    """Place every quantized projection, and check all of its tensors but ``qweight``'s values.

    Raises:
        CheckpointError: naming file, module and reason.
    """
    conversions = list(conversions)
    finder = _Finder(model, index, conversions)
    plan = Placement()
    for stored, infos in index.projections().items():
        place = finder.place(stored)
        if place is None:
            plan.unplaced.append(stored)
            continue
        target, container = place
        if target in plan.projections:
            twin = plan.projections[target].stored
            raise CheckpointError(
                f"this and {twin} are both {target}", file=next(iter(infos.values())).file, module=stored
            )
        spec = spec_from_headers(stored, infos, config.for_module(stored), *finder.features(target, container, infos))
        plan.projections[target] = PlacedProjection(stored, infos, spec, container)
    plan.renamings = finder.renamings
    _check_experts(model, plan)
    check_all_values(plan.projections, index, config, model.config.dtype)
    return plan


def finder(model: nn.Module, conversions: Iterable[Any]) -> Callable[[str], tuple[str, str] | None]:
    """From stored names to the modules they mean and the experts modules that hold these (or ""); None for none."""
    return _Finder(model, CheckpointIndex({}), list(conversions)).place


def is_experts(module: nn.Module) -> bool:
    """Whether a module follows transformers' experts interface: 3-D weights of all experts in one parameter."""
    down = getattr(module, "down_proj", None)
    up = getattr(module, "gate_up_proj", getattr(module, "up_proj", None))
    return (
        hasattr(module, "is_transposed")
        and hasattr(module, "num_experts")
        and all(isinstance(weight, torch.Tensor) and weight.ndim == 3 for weight in (up, down))
    )


class _Finder:
    """Finds the module that a stored name means."""

    def __init__(self, model: nn.Module, index: CheckpointIndex, conversions: list[Any]):
        self.modules = dict(model.named_modules())
        self.base = getattr(model, "base_model_prefix", "")
        self.stock = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        self.aliases = ALIASES | expert_aliases(conversions)
        self.renamings: dict[str, str] = {}
        # Biases of all experts in one tensor, as GPT-OSS stores them, beside packed weights expert by expert.
        self.fused_biases = {
            candidate
            for name in index.tensors
            if name.endswith("_proj_bias")
            for candidate in self._candidates(rename_source_key(name, self.stock, [])[0])
        }

    def place(self, stored: str) -> tuple[str, str] | None:
        """Target module, and the experts module that holds it (or ""); None if the model has no place for it."""
        renamed = rename_source_key(f"{stored}.qweight", self.stock, [])[0].removesuffix(".qweight")
        # Like transformers' loader, fall back on the name as stored where renaming leads nowhere.
        candidates = self._candidates(renamed) + self._candidates(stored)
        for candidate in candidates:
            module = self.modules.get(candidate)
            if module is not None and _has_matrix(module):
                return candidate, ""
        for candidate in candidates:
            if found := self._place_expert(candidate):
                return found
        return None

    def _candidates(self, name: str) -> list[str]:
        """A name as it is, and with the base model's prefix added or taken away."""
        return [name, f"{self.base}.{name}", name.removeprefix(f"{self.base}.")] if self.base else [name]

    def _place_expert(self, name: str) -> tuple[str, str] | None:
        """Split ``…experts.3.w1`` or ``…experts.gate_up.3`` into the experts module and its projection."""
        path, _, last = name.rpartition(".")
        container, _, middle = path.rpartition(".")
        module = self.modules.get(container)
        if module is None or not is_experts(module):
            return None
        number, alias = (middle, last) if is_index(middle) else (last, middle)
        if not is_index(number) or alias not in self.aliases:
            return None
        canonical = self.aliases[alias]
        if (middle, last) != (number, canonical):
            leaf = container.rpartition(".")[2]
            old = rf"\d+.{alias}" if is_index(middle) else rf"{alias}.\d+"
            pattern = rf"\.{leaf}\." + old.replace(".", r"\.").replace(r"\d+", r"(\d+)")
            # Only for packed tensors: float experts of other layers keep the names that converters expect.
            self.renamings[rf"{pattern}\.(?={'|'.join(SUFFIXES)})"] = rf".{leaf}.\1.{canonical}."
        return f"{container}.{number}.{canonical}", container

    def features(self, target: str, container: str, infos: Mapping[str, TensorInfo]) -> tuple[int, int, bool]:
        """``(in_features, out_features, has_bias)`` of the module at ``target``."""
        if not container:
            scales = infos.get("scales")
            return features(self.modules[target], scales.shape[-1] if scales and scales.shape else 0)
        experts = self.modules[container]
        projection = target.rpartition(".")[2]
        gated = hasattr(experts, "gate_up_proj")
        down = projection == "down_proj"
        weight = experts.down_proj if down else experts.gate_up_proj if gated else experts.up_proj
        n, k = weight.shape[:0:-1] if experts.is_transposed else weight.shape[1:]
        half = gated and projection in ("gate_proj", "up_proj")
        bias = "down_proj_bias" if down else "gate_up_proj_bias" if gated else "up_proj_bias"
        has_bias = getattr(experts, "has_bias", False) and f"{container}.{bias}" not in self.fused_biases
        return k, n // 2 if half else n, has_bias


def _has_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.ndim == 2


def expert_aliases(conversions: list[Any]) -> dict[str, str]:
    """Expert projection names from the model's converters: ``experts.*.w1.weight`` -> ``experts.gate_up_proj``."""
    found = {}
    for converter in conversions:
        if not isinstance(converter, WeightConverter):
            continue
        leaf = converter.target_patterns[0].rpartition(".")[2]
        roles = {"gate_up_proj": ("gate_proj", "up_proj"), "up_proj": ("up_proj",), "down_proj": ("down_proj",)}
        sources = [re.search(r"\*\.(\w+)\.weight$", source) for source in converter.source_patterns]
        if leaf in roles and len(sources) == len(roles[leaf]) and all(sources):
            found.update({match[1]: role for match, role in zip(sources, roles[leaf], strict=True) if match})
    return found


def _check_experts(model: nn.Module, plan: Placement) -> None:
    for container, found in plan.containers().items():
        experts: Any = model.get_submodule(container)
        number = experts.num_experts
        names = {name.rpartition(".")[2] for name in found}
        file = next(iter(found.values())).infos["qweight"].file
        needed: tuple[str, ...]
        if "gate_up_proj" in names:
            needed = ("gate_up_proj", "down_proj")
        elif hasattr(experts, "gate_up_proj"):
            needed = ("gate_proj", "up_proj", "down_proj")
        else:
            needed = ("up_proj", "down_proj")
        wanted = {f"{expert}.{name}" for expert in range(number) for name in needed}
        for name in sorted(wanted ^ found.keys(), key=_natural):
            missing = name in wanted
            reason = "missing: other experts have it quantized" if missing else f"the layer has {number} experts"
            module = f"{container}.{name}" if missing else found[name].stored
            raise CheckpointError(reason, file=file, module=module)


def _natural(name: str) -> list[Any]:
    return [(is_index(part), int(part) if is_index(part) else part) for part in name.split(".")]
