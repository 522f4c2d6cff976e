"""The names under which a checkpoint of this model would store its packed layers."""

from __future__ import annotations

from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from graftq.adapters.transformers.placement import expert_aliases, finder
from graftq.adapters.transformers.saving import StoredNames


class Naming:
    """Names in files for names in the model, such that loading finds the way back.

    Args:
        model: The model; if it was loaded, its files' names count.
    """

    def __init__(self, model: Any):
        known = getattr(model, "_weight_conversions", None)
        self.conversions = get_model_conversion_mapping(model, add_legacy=False) if known is None else list(known)
        renamings = [entry for entry in self.conversions if isinstance(entry, WeightRenaming)]
        self.backward = StoredNames({}, renamings).reverse_transform()
        self.aliases = {role: alias for alias, role in expert_aliases(self.conversions).items()}
        self.find = finder(model, get_model_conversion_mapping(model))  # as a load of the files will

    def stored(self, target: str, container: str = "") -> str:
        """The stored name of a projection.

        Args:
            target: Its name in the model; an expert's is ``...experts.3.gate_proj``.
            container: The experts module, or "".

        Raises:
            ValueError: if a load would not find the module by any name that could be given to it.
        """
        own = target
        if container:
            path, _, role = target.rpartition(".")
            own = f"{path}.{self.aliases.get(role, role)}"
        for name in (self._renamed(own), own, target):
            if self.find(name) == (target, container):
                return name
        raise ValueError(f"{target}: no name in a checkpoint leads to this module")

    def plain(self, target: str) -> str:
        """The stored name of a layer that stays float."""
        return self._renamed(target)

    def _renamed(self, name: str) -> str:
        """Renamings may ask for what stands behind the module's name, so there is something."""
        for suffix in (".qweight", ".weight"):
            renamed = self.backward.rename_source_key(name + suffix)[0]
            if renamed.endswith(suffix):
                return renamed.removesuffix(suffix)
        return name
