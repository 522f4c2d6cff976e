"""Solutions in AutoGPTQ's layout."""

from __future__ import annotations

from dataclasses import replace

import torch

from graftq.quant_linear.layouts import GptqTensors, owned
from graftq.quant_linear.making.solve import Solution
from graftq.quant_linear.packing import pack_codes, sequential_g_idx
from graftq.quant_linear.spec import QuantSpec


def pack(solution: Solution, rows: slice = slice(None)) -> list[tuple[GptqTensors, QuantSpec]]:
    """The layers of a batch as a checkpoint of format ``gptq`` stores them, packed side by side.

    Args:
        solution: What was made.
        rows: Outputs of each, where several layers were made side by side.

    Returns:
        For each layer the tensors, on the CPU, without a bias, and the spec that describes them. A GPU is waited for
        once a layer, for its codes, and three times for all the others.
    """
    method = solution.method
    codes, scales, zeros = (part[:, :, rows] for part in (solution.codes, solution.scales, solution.zeros))
    batch, width, outputs = codes.shape
    spec = QuantSpec(
        bits=method.bits,
        in_features=width,
        out_features=outputs,
        group_size=width if method.group_size == -1 else min(method.group_size, width),
        num_groups=scales.shape[1],
        desc_act=False,
        sym=method.sym,
        zero_offset=1,
        padded_in=width,
        padded_out=outputs,
        stored_g_idx=width,
        stored_bias=0,
    )
    qweight = _pack_first(codes.transpose(0, 1), method.bits)
    qzeros = _pack_first(zeros.permute(2, 0, 1).to(torch.int32) - spec.zero_offset, method.bits).permute(1, 2, 0).cpu()
    scales, g_idx = scales.cpu(), solution.g_idx.cpu()
    sequential = sequential_g_idx(spec)
    found = []
    for index in range(batch):
        is_ordered = not torch.equal(g_idx[index], sequential)
        layer = GptqTensors(
            owned(qweight[:, index]).cpu(),
            owned(qzeros[index]),
            owned(scales[index]),
            g_idx[index].clone(),  # layers side by side would share it
        )
        found.append((layer, replace(spec, desc_act=is_ordered)))
    return found


def _pack_first(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack [count, layers, columns] along the first dimension."""
    return pack_codes(codes.flatten(1), bits).unflatten(1, codes.shape[1:])
