"""Whether what is cut off a projection is padding: inputs and outputs that the model does not have.

A configuration that is wrong about a size looks like a checkpoint whose writer has padded, so the values decide.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from graftq.plugin.checkpoint.headers import TensorInfo
from graftq.quant_linear.errors import CheckpointError
from graftq.quant_linear.spec import QuantSpec

if TYPE_CHECKING:
    import torch


def is_padded(spec: QuantSpec) -> bool:
    """Whether any inputs or outputs are cut off."""
    return spec.padded_in > spec.in_features or spec.padded_out > spec.out_features


def check_padding(
    module: str, infos: Mapping[str, TensorInfo], spec: QuantSpec, values: Mapping[str, torch.Tensor]
) -> None:
    """Refuse to cut off anything but zeros.

    Outputs that are cut must have weights and a bias of zero. Inputs that are cut must have weights of zero, or codes
    of zero: some writers pad the packed words, and give the layer inputs of zero there.

    Args:
        module: Its name in the checkpoint.
        infos: Its tensors' headers by suffix.
        spec: Its description, with its true ``desc_act``.
        values: Its tensors by suffix, with ``qweight``.

    Raises:
        CheckpointError: if a weight or a bias that is not zero would be lost.
    """
    k, n = spec.in_features, spec.out_features
    file = infos["qweight"].file
    if spec.stored_bias > n and values["bias"][n:].any():
        raise CheckpointError(f"non-zero bias beyond the layer's {n} outputs", file=file, module=infos["bias"].name)
    if spec.padded_out > n:
        _, weights = _part(spec, values, range(k), range(n, spec.padded_out))
        if weights.any():
            reason = f"weights that are not zero for {spec.padded_out} outputs, the layer has {n}"
            raise CheckpointError(reason, file=file, module=module)
    if spec.padded_in > k:
        codes, weights = _part(spec, values, range(k, spec.padded_in), range(n))
        if codes.any() and weights.any():
            reason = f"weights that are not zero for {spec.padded_in} inputs, the layer has {k}"
            raise CheckpointError(reason, file=file, module=module)


def _part(
    spec: QuantSpec, values: Mapping[str, torch.Tensor], rows: range, columns: range
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and weights [rows, columns] of a part of the stored projection; no other part is read."""
    from graftq.quant_linear.layouts import GptqTensors
    from graftq.quant_linear.packing import sequential_g_idx, unpack_codes, weights_of, zero_points

    stored = replace(spec, in_features=spec.padded_in, out_features=spec.padded_out)
    first = rows.start // 32 * 32  # 32 codes fill whole words, whatever their width
    words = values["qweight"][first * spec.bits // 32 :, columns.start : columns.stop]
    codes = unpack_codes(words.contiguous(), spec.bits, rows.stop - first)[rows.start - first :]
    g_idx = values.get("g_idx")
    if g_idx is None or len(g_idx) < rows.stop or not (spec.desc_act or spec.num_groups == 1):
        g_idx = sequential_g_idx(stored, codes.device)
    group = g_idx[rows.start : rows.stop].long().clamp(0, spec.num_groups - 1)
    zeros = zero_points(GptqTensors(**values), stored)[:, columns.start : columns.stop]
    return codes, weights_of(codes, zeros, values["scales"][:, columns.start : columns.stop], group)
