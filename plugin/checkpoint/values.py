"""Whether the values of a projection's small tensors bear out its spec and its label, or a refusal that says why not.

Of ``qweight``'s values, only those that the model has no place for are looked at, so that checking a checkpoint reads
about a tenth of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from graftq.plugin.checkpoint.headers import TensorInfo
from graftq.plugin.checkpoint.padding import check_padding, is_padded
from graftq.plugin.checkpoint.validation import Declared
from graftq.quant_linear.errors import CheckpointError
from graftq.quant_linear.spec import QuantSpec

if TYPE_CHECKING:
    import torch

LARGEST_WEIGHT = math.sqrt(3.4e38)
"""Beyond this, a weight's product with an activation of its own size is no float32, in which every kernel adds up."""


def check_values(
    module: str,
    infos: Mapping[str, TensorInfo],
    spec: QuantSpec,
    declared: Declared,
    values: Mapping[str, torch.Tensor],
    dtype: torch.dtype | None = None,
) -> QuantSpec:
    """Hold a projection's values against its spec and its label.

    Args:
        module: Its name in the checkpoint.
        infos: Its tensors' headers by suffix.
        spec: From :func:`spec_from_headers`.
        declared: What the configuration says.
        values: The tensors themselves by suffix, ``qweight`` only where the spec has padding.
        dtype: What the layer computes in, if that is known.

    Returns:
        The spec with ``desc_act`` and ``sym`` as the values show them.

    Raises:
        CheckpointError: if ``g_idx`` is out of range, scales are not finite or too large to compute with, the zero
            points contradict the label, a bias is not zero where the model has none, or padding is not zero.
    """
    _check_scales(infos["scales"], spec, values["scales"], dtype)
    if "bias" in values and not spec.has_bias and values["bias"].any():
        info = infos["bias"]
        raise CheckpointError("non-zero bias, but the model's layer has none", file=info.file, module=info.name)
    if "g_idx" in values:
        spec = _check_g_idx(infos["g_idx"], spec, declared, values["g_idx"])
    elif spec.num_groups > 1 and (spec.desc_act or declared.disputed_order):
        why = declared.disputed_order or "desc_act is true"
        raise CheckpointError(f"{why} but g_idx is missing", file=infos["qweight"].file, module=module)
    spec = replace(spec, sym=_check_zero_points(infos["qzeros"], spec, declared, values["qzeros"]))
    if is_padded(spec):
        check_padding(module, infos, spec, values)
    return spec


def _range(tensor: torch.Tensor) -> tuple[Any, Any]:
    """The least and the greatest value, both NaN if there is any; by one reduction and one wait for the device."""
    import torch

    low, high = torch.stack(tensor.aminmax()).tolist()
    return low, high


def _check_scales(info: TensorInfo, spec: QuantSpec, scales: torch.Tensor, dtype: torch.dtype | None) -> None:
    import torch

    low, high = _range(scales)
    if not (math.isfinite(low) and math.isfinite(high)):
        bad = "NaN" if math.isnan(low) else "infinite"
        raise CheckpointError(f"{bad} values among the scales", file=info.file, module=info.name)
    largest = max(-low, high) * 2**spec.bits
    limit = LARGEST_WEIGHT if dtype is None else min(torch.finfo(dtype).max, LARGEST_WEIGHT)
    if largest > limit:
        where = "" if dtype is None or limit == LARGEST_WEIGHT else f" in {str(dtype).removeprefix('torch.')}"
        raise CheckpointError(
            f"scales up to {largest / 2**spec.bits:.3g} overflow{where}", file=info.file, module=info.name
        )


def _check_g_idx(info: TensorInfo, spec: QuantSpec, declared: Declared, g_idx: torch.Tensor) -> QuantSpec:
    import torch

    used = g_idx[: spec.in_features]
    low, high = _range(used)
    if low < 0 or high >= spec.num_groups:
        raise CheckpointError(
            f"group {low if low < 0 else high} out of range, there are {spec.num_groups} groups",
            file=info.file,
            module=info.name,
        )
    if spec.num_groups == 1:
        return replace(spec, desc_act=False)
    if high == 0:
        if declared.desc_act or declared.disputed_order:
            why = declared.disputed_order or "desc_act is true"
            raise CheckpointError(
                f"all zeros, but there are {spec.num_groups} groups and {why}",
                file=info.file,
                module=info.name,
            )
        return replace(spec, desc_act=False)  # how GPTQ-for-LLaMa wrote "no act-order"
    sequential = torch.arange(spec.in_features, dtype=used.dtype, device=used.device) // spec.group_size
    return replace(spec, desc_act=not torch.equal(used, sequential))


def _check_zero_points(info: TensorInfo, spec: QuantSpec, declared: Declared, qzeros: torch.Tensor) -> bool:
    """Whether every zero point is ``2**(bits-1)``; raises if that contradicts the label."""
    middle = 2 ** (spec.bits - 1)
    low, high = _range_of_codes(qzeros, spec)
    if low == high == middle - spec.zero_offset:
        return True
    label, other = ("gptq", "gptq_v2") if spec.zero_offset else ("gptq_v2", "gptq")
    if low == high == middle - (1 - spec.zero_offset):
        # Also where `sym` is false: a whole projection of zero points that all happen to be this one is no chance.
        raise CheckpointError(
            f"labeled {label}, but the symmetric zero points are stored as {other} stores them ({low})",
            file=info.file,
            module=info.name,
        )
    if declared.sym:
        raise CheckpointError(
            f"labeled sym: true, but stored zero points range from {low} to {high}", file=info.file, module=info.name
        )
    return False


def _range_of_codes(qzeros: torch.Tensor, spec: QuantSpec) -> tuple[int, int]:
    """The least and the greatest stored zero point; where all words are the same one, it is all that is unpacked."""
    from graftq.quant_linear.packing import unpack_codes

    words, rest = divmod(spec.out_features * spec.bits, 32)
    if 32 % spec.bits == 0 and not rest:
        low, high = _range(qzeros[:, :words])
        if low == high:
            codes = [low >> shift & (2**spec.bits - 1) for shift in range(0, 32, spec.bits)]
            return min(codes), max(codes)
    low, high = _range(unpack_codes(qzeros.T, spec.bits, spec.out_features))
    return low, high
