"""The product with one projection in tiles: its launches, settled once for each shape of activations.

A decode step has hundreds of products and takes a few milliseconds, so what each costs the host counts: tile, grid,
numbers and constants are worked out at the first call, and found again by one look-up.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from graftq.quant_linear.gpu.dequantized_weights import TiledWeights, dequantized_runs
from graftq.quant_linear.gpu.devices import device_of, program_for, row_stride
from graftq.quant_linear.gpu.split_counters import counters
from graftq.quant_linear.gpu.tile_heuristics import Tile, choose
from graftq.quant_linear.gpu.tiled_layout import TiledLayout
from graftq.quant_linear.kernels.gather import gather_kernel
from graftq.quant_linear.kernels.gemm import matrix_kernel
from graftq.quant_linear.kernels.gemv import vector_kernel
from graftq.quant_linear.kernels.launch import Launch
from graftq.quant_linear.spec import QuantSpec


class LinearKey(NamedTuple):
    """What of a call its launches depend on: of the activations, then of the :class:`TiledWeights`."""

    signature: str
    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    atoms: int
    scale_rows: int
    scale_stride: int
    zero_stride: int
    scale_dtype: torch.dtype
    bias_dtype: torch.dtype | None
    is_ordered: bool


@lru_cache(maxsize=4096)
def launches_for(*given: object) -> LinearLaunches:
    """The product for what is :class:`LinearKey`."""
    return LinearLaunches(LinearKey(*given))  # type: ignore[arg-type]


class LinearLaunches:
    """``x @ W.T + bias``: act-order's gathering, then unpacking in the product or before it."""

    def __init__(self, given: LinearKey):
        spec = QuantSpec.parse(given.signature)
        group = TiledLayout(spec).group(given.scale_rows)
        m, k, places = given.shape[:-1].numel(), spec.in_features, given.atoms * 128
        if given.shape[-1] != k:
            raise RuntimeError(f"an input of width {given.shape[-1]} for a layer of {k} inputs")
        device = device_of(given.device)
        tile = choose(device, spec.bits, group, spec.out_features, places, m) if m else None
        overlap = given.is_ordered and tile is not None and device.capability >= 90
        self._out_shape = (*given.shape[:-1], spec.out_features)
        self._is_empty = m == 0
        stride = row_stride(given.shape, given.strides)
        self._is_scattered = stride is None
        if stride is None:
            stride = k
        self._gather: Launch | None = None
        if given.is_ordered:
            block = 256 if m <= 64 else 1024
            # Tokens first: a grid's first dimension is the only one that may exceed 65535.
            grid = (m, -(-places // block), 1)
            self._gather = Launch(gather_kernel, grid, (k, places, stride), (block, overlap), (("num_warps", 4),))
            self._gathered_shape = (m, places)
            k = stride = places
        self._multiply: _FusedProduct | _DequantizedProduct
        if tile is None:
            self._multiply = _DequantizedProduct(spec, k)
        else:
            self._multiply = _FusedProduct(given, spec, group, tile, (m, k, stride), overlap)

    def __call__(self, x: torch.Tensor, weights: tuple[torch.Tensor | None, ...]) -> torch.Tensor:
        """[..., N], contiguous, for the tensors of :class:`TiledWeights`."""
        out = x.new_empty(self._out_shape)
        if self._is_empty:
            return out
        if self._is_scattered:
            x = x.contiguous()
        if self._gather is not None:
            gathered = x.new_empty(self._gathered_shape)
            order = weights[4]
            assert order is not None
            self._gather(x, order, gathered)
            x = gathered
        self._multiply(x, weights, out)
        return out


class _FusedProduct:
    """Unpacks in the product."""

    def __init__(
        self, given: LinearKey, spec: QuantSpec, group: int, tile: Tile, rows: tuple[int, int, int], overlap: bool
    ):
        (m, k, stride), n, atoms = rows, spec.out_features, given.atoms
        self._device = given.device
        self._tiles = -(-n // tile.rows) * (1 if tile.tokens == 1 else -(-m // tile.tokens))
        self._partials = tile.splits * m * n if tile.splits > 1 else 0
        program = program_for(given.device, spec.bits, given.dtype, spec.sym)
        weights = (spec.bits, group, spec.sym, spec.zero_offset, program, given.bias_dtype is not None)
        strides = (given.scale_stride, given.zero_stride)
        mask_k = k < atoms * 128
        grid, options = (self._tiles, tile.splits, 1), tile.options(overlap)
        constants: tuple[object, ...]
        if tile.tokens == 1:
            constants = (*weights, mask_k, overlap, tile.rows, tile.unroll, tile.splits)
            self._launch = Launch(vector_kernel, grid, (n, k, atoms, *strides), constants, options)
        else:
            masks = (m % tile.tokens > 0, mask_k)
            shape = (tile.rows, tile.tokens, tile.unroll, tile.splits)
            constants = (*weights, *masks, tile.scale_weights, m > tile.tokens, overlap, *shape)
            numbers = (m, n, k, atoms, given.scale_rows, stride, *strides)
            self._launch = Launch(matrix_kernel, grid, numbers, constants, options)

    def __call__(self, x: torch.Tensor, weights: tuple[torch.Tensor | None, ...], out: torch.Tensor) -> None:
        codes, high, scales, qzeros, _, bias = weights
        assert codes is not None
        assert scales is not None
        partials = arrivals = codes  # any tensor: without splits the kernel touches neither
        if self._partials:
            partials = torch.empty(self._partials, dtype=torch.float32, device=self._device)
            arrivals = counters(self._device, self._tiles)
        # Likewise for what is not there.
        self._launch(
            x,
            codes,
            codes if high is None else high,
            scales,
            codes if qzeros is None else qzeros,
            scales if bias is None else bias,
            out,
            partials,
            arrivals,
        )


class _DequantizedProduct:
    """Dequantizes, and leaves the product to cuBLAS."""

    def __init__(self, spec: QuantSpec, k: int):
        self._spec = spec
        self._k = k

    def __call__(self, x: torch.Tensor, weights: tuple[torch.Tensor | None, ...], out: torch.Tensor) -> None:
        given = TiledWeights(*weights)  # type: ignore[arg-type]
        x, out = x.reshape(-1, self._k), out.view(-1, out.shape[-1])
        for first, run in dequantized_runs(given, self._spec, x.dtype):
            last = first + len(run)
            transposed = run[:, : self._k].T
            if given.bias is None:
                torch.mm(x, transposed, out=out[:, first:last])
            else:
                torch.addmm(given.bias[first:last].to(x.dtype), x, transposed, out=out[:, first:last])
