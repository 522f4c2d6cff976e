"""Looking at quantized projections without a model: what their headers and small tensors say of themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from graftq.plugin.checkpoint.configuration import QuantConfig
from graftq.plugin.checkpoint.headers import CheckpointIndex, TensorInfo
from graftq.plugin.checkpoint.padding import is_padded
from graftq.plugin.checkpoint.validation import Declared, spec_from_headers
from graftq.plugin.checkpoint.values import check_values
from graftq.quant_linear.errors import CheckpointError
from graftq.quant_linear.spec import QuantSpec

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class InspectedProjection:
    """One projection.

    Attributes:
        stored: Its name.
        infos: Its tensors by suffix.
        spec: Its description; ``desc_act`` and ``sym`` as declared until values were looked at. None if it is damaged.
        error: What is wrong with it, or "".
        g_idx: "absent", "all zero", "in order", "unordered", or "" while not looked at.
        idle_bias: Whether it stores a bias of zeros only.
        highest_zero: Whether stored zero points reach ``2**bits - 1``.
    """

    stored: str
    infos: Mapping[str, TensorInfo]
    spec: QuantSpec | None = None
    error: str = ""
    g_idx: str = ""
    idle_bias: bool = False
    highest_zero: bool = False

    @property
    def small(self) -> dict[str, TensorInfo]:
        """All of its tensors but the weights."""
        return {suffix: info for suffix, info in self.infos.items() if suffix != "qweight"}


def look_at_headers(stored: str, infos: Mapping[str, TensorInfo], declared: Declared) -> InspectedProjection:
    """Describe a projection by its tensors' shapes; sizes that only the model knows are taken as stored."""
    try:
        spec = spec_from_headers(stored, infos, declared, has_bias="bias" in infos)
    except CheckpointError as error:
        return InspectedProjection(stored, infos, error=str(error))
    return InspectedProjection(stored, infos, spec, g_idx="" if "g_idx" in infos else "absent")


def look_at_values(
    seen: Mapping[str, InspectedProjection], index: CheckpointIndex, config: QuantConfig
) -> dict[str, InspectedProjection]:
    """Refine what headers said by the values of the small tensors, file by file."""
    result = dict(seen)
    sound = {stored: one.infos for stored, one in seen.items() if one.spec is not None}
    padded = {stored for stored, one in seen.items() if one.spec is not None and is_padded(one.spec)}
    for stored, values in index.read_small(sound, padded):
        result[stored] = _look(seen[stored], config.for_module(stored), values)
    return result


def _look(one: InspectedProjection, declared: Declared, values: Mapping[str, torch.Tensor]) -> InspectedProjection:
    from graftq.quant_linear.packing import unpack_codes

    assert one.spec is not None
    idle = "bias" in values and not values["bias"].any()
    try:
        spec = check_values(one.stored, one.infos, one.spec, declared, values)
    except CheckpointError as error:
        return replace(one, spec=None, error=str(error))
    if idle:
        spec = replace(spec, stored_bias=0)
    order = one.g_idx
    if "g_idx" in values:
        zero = spec.num_groups > 1 and not values["g_idx"].any()
        order = "all zero" if zero else "unordered" if spec.desc_act else "in order"
    highest = not spec.sym and int(unpack_codes(values["qzeros"].T, spec.bits, spec.out_features).max())
    return replace(one, spec=spec, g_idx=order, idle_bias=idle, highest_zero=highest == 2**spec.bits - 1)
