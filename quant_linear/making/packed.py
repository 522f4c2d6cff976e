"""Solutions in AutoGPTQ's layout."""

from __future__ import annotations

import torch

from graftq.quant_linear.layouts import GptqTensors
from graftq.quant_linear.making.solve import Solution
from graftq.quant_linear.packing import pack_codes
from graftq.quant_linear.spec import QuantSpec


def pack(solution: Solution, index: int = 0, rows: slice = slice(None)) -> tuple[GptqTensors, QuantSpec]:
    """One layer as a checkpoint of format ``gptq`` stores it.

    Args:
        solution: What was made.
        index: Which layer of the batch.
        rows: Its outputs, where several layers were made side by side.

    Returns:
        The tensors, without a bias, and the spec that describes them.
    """
    method = solution.method
    codes, scales = solution.codes[index][:, rows], solution.scales[index][:, rows].contiguous()
    zeros, g_idx = solution.zeros[index][:, rows], solution.g_idx[index].clone()
    width, outputs = codes.shape
    group_size = width if method.group_size == -1 else min(method.group_size, width)
    sequential = torch.arange(width, dtype=torch.int32, device=g_idx.device) // group_size
    spec = QuantSpec(
        bits=method.bits,
        in_features=width,
        out_features=outputs,
        group_size=group_size,
        num_groups=len(scales),
        desc_act=not torch.equal(g_idx, sequential),
        sym=method.sym,
        zero_offset=1,
        padded_in=width,
        padded_out=outputs,
        stored_g_idx=width,
        stored_bias=0,
    )
    qzeros = pack_codes(zeros.T.to(torch.int32) - spec.zero_offset, method.bits).T.contiguous()
    return GptqTensors(pack_codes(codes, method.bits), qzeros, scales, g_idx), spec
