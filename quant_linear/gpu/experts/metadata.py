"""The packed experts' tensors that no kernel reads: what unpacking needs to restore zero points, g_idx and dtypes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from graftq.quant_linear.experts_spec import ExpertsSpec
from graftq.quant_linear.layouts import STORED_DTYPES, GptqTensors, stored_dtypes


@dataclass(frozen=True)
class StoredMetadata:
    """The metadata of one expert's projection; ``g_idx`` is None if the checkpoint stores none."""

    qzeros: torch.Tensor
    g_idx: torch.Tensor | None
    scale_dtype: torch.dtype
    bias_dtype: torch.dtype


def pack_metadata(spec: ExpertsSpec, experts: Sequence[Mapping[str, GptqTensors]]) -> dict[str, torch.Tensor]:
    """``qzeros`` and ``g_idx`` of all experts, flat; ``dtypes`` int8 [E, projections, 3]: of scales, bias and g_idx."""
    every = [stored[name] for stored in experts for name in spec.names]
    dtypes = stored_dtypes(every).to(every[0].qweight.device)
    kept = {
        "qzeros": torch.cat([tensors.qzeros.flatten() for tensors in every]),
        "dtypes": dtypes.view(len(experts), len(spec.names), 3),
    }
    g_idx = [tensors.g_idx for tensors in every if tensors.g_idx is not None]
    return kept | ({"g_idx": torch.cat(g_idx)} if g_idx else {})


def g_idx_on_host(
    spec: ExpertsSpec, experts: Sequence[Mapping[str, GptqTensors]], metadata: Mapping[str, torch.Tensor]
) -> list[dict[str, torch.Tensor | None]]:
    """Each expert's ``g_idx`` by projection, copied to the CPU at once: what they decide is decided there.

    Each look at a value on a GPU waits for all that the GPU has been given to do.
    """
    stored = [tensors[name].g_idx for tensors in experts for name in spec.names]
    lengths = [len(g_idx) for g_idx in stored if g_idx is not None]
    copies = iter(metadata["g_idx"].cpu().split(lengths) if lengths else ())
    return [{name: None if each[name].g_idx is None else next(copies) for name in spec.names} for each in experts]


def metadata_of(spec: ExpertsSpec, tensors: Mapping[str, torch.Tensor], name: str, expert: int) -> StoredMetadata:
    """A copy of one projection's part of what :func:`pack_metadata` returned."""
    number, own = spec.names.index(name), spec.of(name)[expert]
    every = [specs[other] for other in range(expert + 1) for _, specs in spec.projections]
    before = every[: expert * len(spec.names) + number]
    zeros = sum(each.num_groups * each.packed_zero_columns for each in before)
    rows = sum(each.stored_g_idx for each in before)
    scale, bias, g_idx = (STORED_DTYPES[code] for code in tensors["dtypes"][expert, number].tolist())
    qzeros = tensors["qzeros"][zeros : zeros + own.num_groups * own.packed_zero_columns]
    return StoredMetadata(
        qzeros.clone().view(own.num_groups, own.packed_zero_columns),
        tensors["g_idx"][rows : rows + own.stored_g_idx].to(g_idx, copy=True) if own.stored_g_idx else None,
        scale,
        bias,
    )
