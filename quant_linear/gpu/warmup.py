"""Kernels compiled while a model loads, so that no request waits for one: all that so many tokens can reach.

Which kernel a call takes is a pure function of the layer's sizes and the number of tokens (``tile_heuristics``), and so
is what Triton compiles for: constants, and whether a size of the layer is 1, a multiple of 16, or neither; integers
that follow the number of tokens do not matter (``launch.VARIABLE``). So calls are gone through for enough token counts,
without being run, and what they would launch is compiled, in parallel.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor

import torch

from graftq.quant_linear.experts import QuantExperts
from graftq.quant_linear.gpu.devices import current
from graftq.quant_linear.linear import QuantLinear

logger = logging.getLogger(__name__)

_compiled: set[Hashable] = set()
"""Kinds of layers that have been gone through in this process, and for how many tokens."""

MOST_TOKENS = 8192
"""More tokens than this need no other kernels: calls of so many go in parts, or multiply dequantized weights."""

EACH = 512
"""Up to so many tokens every count is gone through; beyond, what is compiled changes less often."""


def token_counts(most: int) -> list[int]:
    """Numbers of tokens from 1 to ``most`` that reach every kernel that any number in between does."""
    return sorted({*range(1, min(EACH, most) + 1), *range(EACH, most, 8), most})


def compile_kernels(module: QuantLinear | QuantExperts, call: Callable[[int], object], tokens: int) -> int:
    """Compile what a packed layer needs for any number of tokens up to a limit; a second layer of a kind costs nothing.

    Args:
        module: Bound, on the device where it will run.
        call: Calls ``module`` with so many tokens, of the dtypes and strides of real calls. Neither inputs nor outputs
            need to mean anything, but that experts exist: no kernel of ours runs.
        tokens: The most tokens of a call.

    Returns:
        The number of kernels that were compiled, or read from Triton's cache on disk; 0 where Triton runs none.
    """
    if tokens < 1 or module.kernel != "triton":
        return 0
    tensors = [*module.named_parameters(), *module.named_buffers()]
    device = tensors[0][1].device
    kind = (repr(module), tuple((name, tensor.shape, tensor.dtype) for name, tensor in tensors), device, tokens)
    if kind in _compiled:
        return 0
    from graftq.quant_linear.gpu.experts.tile_heuristics import TOKENS_AT_ONCE
    from graftq.quant_linear.gpu.tile_heuristics import FUSED_TOKENS
    from graftq.quant_linear.kernels.launch import compiling_ahead  # not at the top, where triton may be absent

    # More tokens dequantize the weights, or go through the experts in parts.
    limit = TOKENS_AT_ONCE if isinstance(module, QuantExperts) else FUSED_TOKENS + 1
    workers = min(16, os.cpu_count() or 1)
    _compiled.add(kind)
    try:
        with (
            torch.no_grad(),
            current(device),
            ThreadPoolExecutor(workers) as executor,
            compiling_ahead(executor) as kernels,
        ):
            for count in token_counts(min(tokens, limit)):
                call(count)
    except Exception as error:  # a size that nobody may ask for is no reason not to load
        logger.warning("graftq: kernels of %s are compiled when they are first needed: %s", module, error)
        return 0
    return len(kernels)
