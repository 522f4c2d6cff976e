"""Parts of a projection, for tensor parallelism and for layers that hold several projections in one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from graftq.quant_linear.layouts import GptqTensors, owned
from graftq.quant_linear.packing import pack_codes, sequential_g_idx, unpack_codes
from graftq.quant_linear.row_order import can_multiply_as_one
from graftq.quant_linear.spec import QuantSpec

Shard = tuple[GptqTensors, QuantSpec]
"""A projection, or a part of one, as a checkpoint would store it: its tensors and their description."""


def shard_outputs(tensors: GptqTensors, spec: QuantSpec, start: int, stop: int) -> tuple[GptqTensors, QuantSpec]:
    """The projection of output rows ``start`` to ``stop`` (column parallel).

    Returns:
        New tensors, in memory of their own (``qzeros`` repacked, since a cut may fall inside a word), and their spec.

    Raises:
        ValueError: for a range outside ``out_features``.
    """
    if not 0 <= start < stop <= spec.out_features:
        raise ValueError(f"outputs {start}:{stop} of {spec.out_features}")
    return select_outputs(tensors, spec, slice(start, stop))


def select_outputs(
    tensors: GptqTensors, spec: QuantSpec, outputs: slice | torch.Tensor
) -> tuple[GptqTensors, QuantSpec]:
    """The projection of some output rows, in the order in which ``outputs`` names them."""
    zeros = unpack_codes(tensors.qzeros.T, spec.bits, spec.out_features)[outputs]
    part = GptqTensors(
        owned(tensors.qweight[:, outputs]),
        pack_codes(zeros, spec.bits).T.contiguous(),
        owned(tensors.scales[:, outputs]),
        tensors.g_idx,
        None if tensors.bias is None else owned(tensors.bias[outputs]),
    )
    width = len(zeros)
    return part, replace(spec, out_features=width, padded_out=width, stored_bias=width if spec.has_bias else 0)


def shard_inputs(
    tensors: GptqTensors, spec: QuantSpec, start: int, stop: int, keep_bias: bool
) -> tuple[GptqTensors, QuantSpec]:
    """The projection of input rows ``start`` to ``stop`` (row parallel); the parts' products sum up to the whole's.

    With act-order, or where a cut falls inside a group, the part keeps all scales and refers to them by a
    ``g_idx`` of its own; otherwise it keeps the scales of its groups.

    Args:
        tensors: The whole projection.
        spec: Its description.
        start: First input row.
        stop: Beyond the last.
        keep_bias: Whether this part adds the bias; one of the parts should.

    Raises:
        ValueError: for a range outside ``in_features``.
    """
    if not 0 <= start < stop <= spec.in_features:
        raise ValueError(f"inputs {start}:{stop} of {spec.in_features}")
    width = stop - start
    if start * spec.bits % 32 == 0 and stop * spec.bits % 32 == 0:
        qweight = owned(tensors.qweight[start * spec.bits // 32 : stop * spec.bits // 32])
    else:
        qweight = pack_codes(unpack_codes(tensors.qweight, spec.bits, spec.in_features)[start:stop], spec.bits)
    bias = tensors.bias if keep_bias else None
    part = replace(spec, in_features=width, padded_in=width, stored_bias=spec.stored_bias if keep_bias else 0)
    group_size = spec.group_size
    if spec.num_groups == 1:
        part = replace(part, group_size=width, stored_g_idx=0)
        return GptqTensors(qweight, tensors.qzeros, tensors.scales, None, bias), part
    if not spec.desc_act and start % group_size == 0 and (stop % group_size == 0 or stop == spec.in_features):
        groups = slice(start // group_size, -(-stop // group_size))
        scales, qzeros = owned(tensors.scales[groups]), owned(tensors.qzeros[groups])
        part = replace(part, num_groups=len(scales), group_size=min(group_size, width), stored_g_idx=0)
        return GptqTensors(qweight, qzeros, scales, None, bias), part
    g_idx = tensors.g_idx if spec.desc_act else sequential_g_idx(spec, tensors.qweight.device)
    if g_idx is None:
        raise ValueError("act-order needs g_idx")
    part = replace(part, desc_act=True, stored_g_idx=width)
    return GptqTensors(qweight, tensors.qzeros, tensors.scales, owned(g_idx[start:stop]), bias), part


def sort_inputs(tensors: GptqTensors, spec: QuantSpec) -> tuple[Shard, torch.Tensor | None]:
    """The projection with its input rows sorted by group, for those who can deliver its inputs in any order.

    An expert's ``down_proj`` is fed by outputs that nothing else reads, so ranks may share its inputs out by groups:
    cut as they are stored, every rank would have some rows of every group under act-order, and scales for all of them.

    Returns:
        The projection, without act-order where all groups are of one size, and the input row at each place (int64
        [in_features]); unchanged, and None, where rows are in order of their groups.

    Raises:
        ValueError: if ``g_idx`` is missing.
    """
    if not spec.desc_act or spec.num_groups == 1:
        return (tensors, spec), None
    if tensors.g_idx is None:
        raise ValueError("act-order needs g_idx")
    groups, order = tensors.g_idx[: spec.in_features].long().sort(stable=True)
    codes = unpack_codes(tensors.qweight, spec.bits, spec.in_features)[order]
    even = groups.equal(sequential_g_idx(spec, groups.device)[: spec.in_features].long())
    g_idx = None if even else groups.to(tensors.g_idx.dtype)
    stored = 0 if even else spec.in_features
    part = replace(spec, desc_act=not even, padded_in=spec.in_features, stored_g_idx=stored)
    return (replace(tensors, qweight=pack_codes(codes, spec.bits), g_idx=g_idx), part), order


def shard_expert(wholes: Mapping[str, Shard], down: str, start: int, stop: int, keep_bias: bool) -> dict[str, Shard]:
    """A rank's share of an expert: inner features ``start`` to ``stop``, sorted by the groups of the last projection.

    Args:
        wholes: The expert's projections by name; all but ``down`` have the inner features for outputs.
        down: The name of the projection that has them for inputs.
        start: First inner feature in that order.
        stop: Beyond the last.
        keep_bias: Whether this share adds the bias of ``down``; one of the shares should.
    """
    last, features = share_inputs(*wholes[down], start, stop, keep_bias)
    return {name: last if name == down else select_outputs(*whole, features) for name, whole in wholes.items()}


def share_inputs(
    tensors: GptqTensors, spec: QuantSpec, start: int, stop: int, keep_bias: bool
) -> tuple[Shard, torch.Tensor]:
    """:func:`shard_inputs` of the rows sorted by group, and which rows these are: int64 [stop - start]."""
    whole, order = sort_inputs(tensors, spec)
    rows = torch.arange(start, stop, device=tensors.qweight.device) if order is None else order[start:stop]
    return shard_inputs(*whole, start, stop, keep_bias), rows


def join_outputs(parts: Sequence[tuple[GptqTensors, QuantSpec]]) -> list[tuple[GptqTensors, QuantSpec]]:
    """Merge neighbors that differ in nothing but their outputs, so that one product serves all of them.

    Projections of the same input that were quantized together (q, k and v; gate and up) share their ``g_idx``.

    Args:
        parts: Projections whose outputs are wanted side by side, without biases.

    Returns:
        As many as are needed, in the same order; a projection without a like neighbor is returned as it is.
    """
    runs: list[list[tuple[GptqTensors, QuantSpec]]] = []
    for part in parts:
        if runs and _alike(runs[-1][-1], part):
            runs[-1].append(part)
        else:
            runs.append([part])
    return [run[0] if len(run) == 1 else _join(run) for run in runs]


def _alike(one: tuple[GptqTensors, QuantSpec], other: tuple[GptqTensors, QuantSpec]) -> bool:
    (left, a), (right, b) = one, other
    if left.scales.dtype != right.scales.dtype or a.has_bias or b.has_bias:
        return False
    return can_multiply_as_one(a, left.g_idx, b, right.g_idx)


def _join(run: Sequence[tuple[GptqTensors, QuantSpec]]) -> tuple[GptqTensors, QuantSpec]:
    first, spec = run[0]
    zeros = torch.cat([unpack_codes(tensors.qzeros.T, own.bits, own.out_features) for tensors, own in run])
    joined = GptqTensors(
        torch.cat([tensors.qweight[:, : own.out_features] for tensors, own in run], dim=1),
        pack_codes(zeros, spec.bits).T.contiguous(),
        torch.cat([tensors.scales[:, : own.out_features] for tensors, own in run], dim=1),
        first.g_idx if spec.desc_act else None,
    )
    width = sum(own.out_features for _, own in run)
    sym = all(own.sym for _, own in run)
    stored_g_idx = spec.stored_g_idx if spec.desc_act else 0
    return joined, replace(spec, out_features=width, padded_out=width, sym=sym, stored_g_idx=stored_g_idx)
