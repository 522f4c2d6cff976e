"""The launches of one product ``x @ W.T + bias``, prepared once for each kind of call.

A decode step makes hundreds of these calls within a few milliseconds, so their host time matters: tile, grid,
integers and constants are worked out at the first call of a kind, and found by one look-up from then on.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from graftq.quant_linear.gpu.dequantized_weights import TiledWeights, dequantized_runs
from graftq.quant_linear.gpu.devices import device_of, program_for, row_stride
from graftq.quant_linear.gpu.operands import SplitSpace, bias_name, weight_names
from graftq.quant_linear.gpu.tile_heuristics import Tile, choose
from graftq.quant_linear.gpu.tiled_layout import TiledLayout
from graftq.quant_linear.kernels.gather import gather_kernel
from graftq.quant_linear.kernels.gemm import matrix_kernel
from graftq.quant_linear.kernels.gemv import vector_kernel
from graftq.quant_linear.kernels.launch import Launch, LaunchSequence, Part
from graftq.quant_linear.spec import QuantSpec


class LinearKey(NamedTuple):
    """All that the launches of a call depend on but the tensors' addresses; calls with equal keys share them.

    Attributes:
        signature: ``QuantSpec.signature``.
        shape: Of the activations, [..., K].
        strides: Of the activations.
        dtype: Of the activations.
        device: Of the activations, and of everything else.
        atoms: Atoms of 128 input rows in ``codes``.
        scale_rows: Rows of ``scales``.
        scale_stride: Elements from one row of ``scales`` to the next, more than N where siblings are joined.
        zero_stride: Likewise of ``zeros``, whose elements are pairs of zero points; 0 if symmetric.
        scale_dtype: A kernel is compiled for it.
        bias_dtype: Likewise; None if there is no bias.
        is_ordered: Whether act-order has moved the input rows.
    """

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

    @staticmethod
    def of(x: Tensor, weights: TiledWeights, signature: str) -> LinearKey:
        """The key of ``x @ W.T + bias``.

        Every call builds one: ``tuple.__new__`` takes half the time of the class's own constructor.
        """
        codes, _, scales, zeros, order, bias = weights
        fields = (
            signature,
            x.shape,
            x.stride(),
            x.dtype,
            x.device,
            codes.shape[1],
            scales.shape[0],
            scales.stride()[0],
            0 if zeros is None else zeros.stride()[0],
            scales.dtype,
            None if bias is None else bias.dtype,
            order is not None,
        )
        return tuple.__new__(LinearKey, fields)


@lru_cache(maxsize=4096)
def launches_for(key: LinearKey) -> LinearLaunches:
    """The launches of the calls that have this key."""
    return LinearLaunches(key)


class LinearLaunches:
    """``x @ W.T + bias``: act-order's gathering, then a kernel that unpacks as it multiplies, or dequantized weights.

    Raises:
        RuntimeError: The activations' width is not that of the layer.
    """

    def __init__(self, key: LinearKey):
        spec = QuantSpec.parse(key.signature)
        group = TiledLayout(spec).group(key.scale_rows)
        m, k, places = key.shape[:-1].numel(), spec.in_features, key.atoms * 128
        if key.shape[-1] != k:
            raise RuntimeError(f"an input of width {key.shape[-1]} for a layer of {k} inputs")
        device = device_of(key.device)
        tile = choose(device, spec.bits, group, spec.out_features, places, m) if m else None
        overlap = key.is_ordered and tile is not None and device.capability >= 90
        self._out_shape = (*key.shape[:-1], spec.out_features)
        self._is_empty = m == 0
        stride = row_stride(key.shape, key.strides)
        self._is_scattered = stride is None
        if stride is None:
            stride = k
        gather: _Gather | None = None
        if key.is_ordered:
            gather = _Gather(m, k, places, stride, overlap, key.dtype)
            k = stride = places
        self._product: _FusedProduct | _DequantizedProduct
        if tile is None:
            self._product = _DequantizedProduct(spec, k, gather)
        else:
            self._product = _FusedProduct(key, spec, group, tile, (m, k, stride), gather)

    def run(self, x: Tensor, weights: TiledWeights) -> Tensor:
        """[..., N], contiguous, for tensors that have the key."""
        out = x.new_empty(self._out_shape)
        if self._is_empty:
            return out
        if self._is_scattered:
            x = x.contiguous()
        self._product.run(x, weights, out)
        return out


class _Gather(NamedTuple):
    """Activations ``m`` x ``k``, rows ``stride`` elements apart, in the order of act-order's ``places``."""

    m: int
    k: int
    places: int
    stride: int
    overlap: bool
    dtype: torch.dtype

    @property
    def gathered(self) -> Part:
        """The result, [m, places]."""
        return Part(self.m * self.places, self.dtype)

    def launch(self) -> Launch:
        """Of ``gather_kernel``, on activations, order and result."""
        block = 256 if self.m <= 64 else 1024
        # Tokens first: a grid's first dimension is the only one that may exceed 65535.
        grid = (self.m, -(-self.places // block), 1)
        integers = (self.k, self.places, self.stride)
        return Launch(gather_kernel, grid, integers, (block, self.overlap), (("num_warps", 4),))


_TENSORS = ("x", "codes", "high", "scales", "zeros", "order", "bias", "out", "arrivals")


class _FusedProduct:
    """Unpacks the weights as it multiplies: ``matrix_kernel``, or ``vector_kernel`` for one token.

    Args:
        key: Of the call.
        spec: Its signature's.
        group: Input rows per row of ``scales``, 0 for one group.
        tile: One of the vector kernel's if it has a single token.
        rows: Tokens, width and row stride of the activations that the kernel reads (those gathered, if any).
        gather: What comes before it, if any; the kernel may start before that ends if it says so.
    """

    def __init__(
        self,
        key: LinearKey,
        spec: QuantSpec,
        group: int,
        tile: Tile,
        rows: tuple[int, int, int],
        gather: _Gather | None,
    ):
        (m, k, stride), n, atoms = rows, spec.out_features, key.atoms
        overlap = gather is not None and gather.overlap
        self._device = key.device
        tiles = -(-n // tile.rows) * (1 if tile.tokens == 1 else -(-m // tile.tokens))
        self._space = SplitSpace.of("", tile.splits * m * n if tile.splits > 1 else 0, tiles)
        program = program_for(key.device, spec.bits, key.dtype, spec.sym)
        weights = (spec.bits, group, spec.sym, program, key.bias_dtype is not None)
        strides = (key.scale_stride, 2 * key.zero_stride)
        mask_k = k < atoms * 128
        grid, options = (tiles, tile.splits, 1), tile.options(overlap)
        constants: tuple[object, ...]
        if tile.tokens == 1:
            constants = (*weights, mask_k, overlap, tile.rows, tile.unroll, tile.splits)
            launch = Launch(vector_kernel, grid, (n, k, atoms, *strides), constants, options)
        else:
            masks = (m % tile.tokens > 0, mask_k)
            shape = (tile.rows, tile.tokens, tile.unroll, tile.splits)
            constants = (*weights, *masks, tile.scale_weights, m > tile.tokens, overlap, *shape)
            integers = (m, n, k, atoms, key.scale_rows, stride, *strides)
            launch = Launch(matrix_kernel, grid, integers, constants, options)
        parts, steps = self._space.parts, []
        if gather is not None:
            parts["gathered"] = gather.gathered
            steps.append((gather.launch(), ("x", "order", "gathered")))
        operands = (
            "x" if gather is None else "gathered",
            *weight_names("", spec.bits, spec.sym),
            bias_name("", key.bias_dtype is not None),
            "out",
            *self._space.names,
        )
        self._launches = LaunchSequence(_TENSORS, parts, [*steps, (launch, operands)])

    def run(self, x: Tensor, weights: TiledWeights, out: Tensor) -> None:
        self._launches(x, *weights, out, self._space.counters(self._device))


class _DequantizedProduct:
    """Dequantizes the weights, and leaves the product to cuBLAS: for very many tokens."""

    def __init__(self, spec: QuantSpec, k: int, gather: _Gather | None):
        self._spec = spec
        self._k = k
        self._gather = None if gather is None else gather.launch()

    def run(self, x: Tensor, weights: TiledWeights, out: Tensor) -> None:
        out = out.view(-1, out.shape[-1])
        if self._gather is not None:
            assert weights.order is not None
            gathered = x.new_empty(len(out), self._k)
            self._gather(x, weights.order, gathered)
            x = gathered
        x = x.reshape(-1, self._k)
        for first, run in dequantized_runs(weights, self._spec, x.dtype):
            last = first + len(run)
            transposed = run[:, : self._k].T
            if weights.bias is None:
                torch.mm(x, transposed, out=out[:, first:last])
            else:
                torch.addmm(weights.bias[first:last].to(x.dtype), x, transposed, out=out[:, first:last])
