"""The dequantized weights of one projection, for so many tokens that cuBLAS beats unpacking in the product."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch

from graftq.quant_linear.gpu.devices import program_for
from graftq.quant_linear.gpu.tile_words import TILE_N
from graftq.quant_linear.gpu.tiled_layout import TiledLayout
from graftq.quant_linear.kernels.dequant import dequantize_kernel
from graftq.quant_linear.kernels.launch import Launch
from graftq.quant_linear.spec import QuantSpec

WORKSPACE_BYTES = 128 * 2**20
"""The most memory that dequantized weights take at a time, unless a single tile of 64 output rows needs more."""


class TiledWeights(NamedTuple):
    """The tensors of ``TiledLayout`` that a product reads, in the operators' order; ``zeros`` None if symmetric."""

    codes: torch.Tensor
    high: torch.Tensor | None
    scales: torch.Tensor
    zeros: torch.Tensor | None
    order: torch.Tensor | None
    bias: torch.Tensor | None


def dequantized_runs(weights: TiledWeights, spec: QuantSpec, dtype: torch.dtype) -> Iterator[tuple[int, torch.Tensor]]:
    """Dequantized weights, a run of output rows at a time.

    Yields:
        The run's first output row, and its weights, ``dtype`` [rows, 128 * atoms], inputs in packed order. The next run
        overwrites them.
    """
    n, atoms = spec.out_features, weights.codes.shape[1]
    device, scales = weights.codes.device, weights.scales
    strides = (scales.stride(0), 0 if weights.zeros is None else 2 * weights.zeros.stride(0))
    space = None
    for first, count in runs_of(n, atoms, dtype.itemsize):
        if space is None:  # the first run is the longest
            space = torch.empty(count * TILE_N, atoms * 128, dtype=dtype, device=device)
        _launch(spec.signature, first, count, atoms, scales.shape[0], strides, scales.dtype, dtype, device)(
            weights.codes,
            weights.codes if weights.high is None else weights.high,
            scales,
            weights.codes if weights.zeros is None else weights.zeros,
            space,
        )
        yield first * TILE_N, space[: min(count * TILE_N, n - first * TILE_N)]


def runs_of(n: int, atoms: int, itemsize: int) -> list[tuple[int, int]]:
    """The first tile and the number of tiles of each run; runs are even, and fit the workspace.

    Args:
        n: Output rows.
        atoms: Atoms of 128 input rows.
        itemsize: Bytes of a dequantized weight.
    """
    tiles = -(-n // TILE_N)
    most = max(1, WORKSPACE_BYTES // (TILE_N * 128 * atoms * itemsize))
    step = -(-tiles // -(-tiles // most))
    return [(first, min(step, tiles - first)) for first in range(0, tiles, step)]


@lru_cache(maxsize=1024)
def _launch(
    signature: str,
    first: int,
    count: int,
    atoms: int,
    scale_rows: int,
    strides: tuple[int, int],
    scale_dtype: torch.dtype,  # the kernel is compiled for it
    dtype: torch.dtype,
    device: torch.device,
) -> Launch:
    spec = QuantSpec.parse(signature)
    return Launch(
        dequantize_kernel,
        (count, atoms, 1),
        (first, spec.out_features, atoms, scale_rows, *strides),
        (
            spec.bits,
            TiledLayout(spec).group(scale_rows),
            spec.sym,
            program_for(device, spec.bits, dtype, spec.sym),
        ),
        (("num_warps", 4), ("num_stages", 1)),
    )
