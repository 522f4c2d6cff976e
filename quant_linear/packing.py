"""Codes to words and back, and the dequantization formula: the readable truth for every kernel.

The packing is AutoGPTQ's: codes of ``bits`` bits form a little-endian bit stream over int32 words,
so that a 3-bit code may straddle two words and 32 codes always fill ``bits`` words.
"""

from __future__ import annotations

import sys

import torch

from graftq.quant_linear.layouts import GptqTensors
from graftq.quant_linear.spec import QuantSpec


def unpack_codes(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Read ``count`` codes from the bit stream along dimension 0.

    Args:
        words: int32 [ceil(count * bits / 32) or more, columns].
        bits: Code width, 1 to 8.
        count: Codes to read.

    Returns:
        uint8 [count, columns], each in ``[0, 2**bits)``.
    """
    columns = words.shape[1]
    octets = words.reshape(-1).view(torch.uint8).view(-1, columns, 4).transpose(1, 2)
    octets = (octets.flip(1) if sys.byteorder == "big" else octets).reshape(-1, columns)
    groups = -(-count // 8)  # eight codes fill `bits` bytes
    octets = octets[: groups * bits]
    octets = torch.nn.functional.pad(octets, (0, 0, 0, groups * bits - len(octets))).view(groups, bits, columns)
    codes = octets.new_empty(groups, 8, columns)
    for place in range(8):
        first, shift = divmod(place * bits, 8)
        code = octets[:, first] >> shift
        if shift + bits > 8:
            code |= octets[:, first + 1] << (8 - shift)
        codes[:, place] = code.bitwise_and_((1 << bits) - 1)  # not by `out=`, which torch.compile refuses for a view
    return codes.view(-1, columns)[:count]


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Write codes along dimension 0 as a bit stream; the inverse of :func:`unpack_codes`.

    Args:
        codes: Integers [count, columns] in ``[0, 2**bits)``.
        bits: Code width, 1 to 8.

    Returns:
        int32 [ceil(count * bits / 32), columns]; unused high bits of the last word are zero.
    """
    count, columns = codes.shape
    words = -(-count * bits // 32)
    groups = -(-words * 4 // bits)  # eight codes fill `bits` bytes
    codes = torch.nn.functional.pad(codes.to(torch.uint8), (0, 0, 0, groups * 8 - count)).view(groups, 8, columns)
    octets = codes.new_zeros(groups, bits, columns)
    for place in range(8):
        first, shift = divmod(place * bits, 8)
        octets[:, first].bitwise_or_(codes[:, place] << shift)
        if shift + bits > 8:
            octets[:, first + 1].bitwise_or_(codes[:, place] >> (8 - shift))
    octets = octets.view(-1, columns)[: words * 4].view(words, 4, columns)
    octets = octets.flip(1) if sys.byteorder == "big" else octets
    return octets.transpose(1, 2).clone(memory_format=torch.contiguous_format).view(torch.int32).squeeze(-1)


def sequential_g_idx(spec: QuantSpec, device: torch.device | None = None) -> torch.Tensor:
    """The group of each input row where there is no act-order: int32 [in_features]."""
    return torch.arange(spec.in_features, dtype=torch.int32, device=device) // spec.group_size


def zero_points(tensors: GptqTensors, spec: QuantSpec) -> torch.Tensor:
    """Zero points as the formula uses them: int32 [num_groups, out_features] in ``[0, 2**bits]``."""
    stored = unpack_codes(tensors.qzeros.T, spec.bits, spec.out_features).T
    return stored.to(torch.int32) + spec.zero_offset


def dequantize(tensors: GptqTensors, spec: QuantSpec) -> torch.Tensor:
    """``W[n, k] = (q[k, n] - z[g_idx[k], n]) * scales[g_idx[k], n]`` in float32.

    Source: Frantar et al., GPTQ (2022), in AutoGPTQ's storage. Exact: the integer difference and the
    widened scale are both exact in float32, so that one rounding, the product's, is all there is.

    Args:
        tensors: One projection as stored.
        spec: Its description.

    Returns:
        float32 [out_features, in_features].
    """
    codes = unpack_codes(tensors.qweight, spec.bits, spec.in_features)[:, : spec.out_features]
    if spec.desc_act:
        if tensors.g_idx is None:
            raise ValueError("act-order needs g_idx")
        group = tensors.g_idx[: spec.in_features].long()
    else:
        group = sequential_g_idx(spec, codes.device).long()
    return weights_of(codes, zero_points(tensors, spec), tensors.scales[:, : spec.out_features], group).T


def weights_of(codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """The formula of :func:`dequantize` for any rows and columns of a projection.

    Args:
        codes: uint8 [rows, columns].
        zeros: int32 [num_groups, columns], from :func:`zero_points`.
        scales: Floats [num_groups, columns].
        group: int64 [rows], the group of each row.

    Returns:
        float32 [rows, columns].
    """
    return (codes.to(torch.int32) - zeros[group]).to(torch.float32) * scales.to(torch.float32)[group]
