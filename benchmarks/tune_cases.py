"""What ``tune.py`` tries tiles on: projections and layers of experts, each with its candidates."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest import mock

import torch
from dense import bytes_read
from harness import COLD_BYTES
from moe import LAYERS, MAIN, TINY, Layer, bytes_per_expert, random_experts, random_inputs
from random_weights import DEVICE, Weights, random_tensors, spec_of
from tune_recipes import fitted, recipes

from graftq.quant_linear.gpu import linear_launches
from graftq.quant_linear.gpu.experts import launches, ops
from graftq.quant_linear.gpu.experts.tile_heuristics import (
    choose_matrix,
    choose_tokens,
    choose_vector,
    slots_per_expert,
)
from graftq.quant_linear.gpu.provider import TritonProvider
from graftq.quant_linear.gpu.tile_heuristics import Device, Tile, choose

Tiles = tuple[Tile, ...]
"""One for each product."""

Run = Callable[[int], torch.Tensor]
"""The i-th call: its output."""


@dataclass(frozen=True)
class Dense:
    """One projection, symmetric, group 128, fp16."""

    bits: int
    k: int
    n: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.bits}-bit {self.k}x{self.n} M={self.tokens}"

    def candidates(self, device: Device) -> Iterator[Tiles]:
        """The chosen tile, then others; some twice."""
        chosen = choose(device, self.bits, 128, self.n, self.k, self.tokens)
        assert chosen is not None
        yield (chosen,)
        for recipe in recipes(self.bits, self.tokens):
            tiles = -(-self.n // recipe.rows) * -(-self.tokens // recipe.tokens)
            for tile in fitted(recipe, device, tiles, self.k // 128):
                yield (tile,)

    def small(self) -> Dense:
        """A case of the same kernels: numbers are multiples of 16 as before, and the rest is equal."""
        return replace(self, k=2048, n=2048)

    def prepared(self, is_cold: bool) -> Run:
        """Random weights, and enough copies of them if the L2 cache is to be cold."""
        spec = spec_of(self.k, self.n, Weights(self.bits))
        provider = TritonProvider()
        first = provider.layout(spec).pack(random_tensors(spec, None))
        copies = COLD_BYTES // bytes_read(first) if is_cold else 0
        sets = [first] + [{name: tensor.clone() for name, tensor in first.items()} for _ in range(copies)]
        x = torch.randn(self.tokens, self.k, device=DEVICE).half()
        return lambda i: provider.linear(x, sets[i % len(sets)], spec)

    @contextmanager
    def using(self, tiles: Tiles) -> Iterator[None]:
        """With these tiles instead of the chosen."""
        linear_launches.launches_for.cache_clear()
        with mock.patch.object(linear_launches, "choose", return_value=tiles[0]):
            yield
        linear_launches.launches_for.cache_clear()


@dataclass(frozen=True)
class Experts:
    """One layer's experts; two tiles, of the first product and the second."""

    layer: Layer
    weights: Weights
    tokens: int

    def __str__(self) -> str:
        return f"{self.layer.name} {self.weights} T={self.tokens}"

    @property
    def _products(self) -> tuple[tuple[int, int], ...]:
        """Output rows and atoms of both."""
        hidden, inner = self.layer.hidden, self.layer.inner
        return (2 * inner, hidden // 128), (hidden, inner // 128)

    def candidates(self, device: Device) -> Iterator[Tiles]:
        """The chosen tiles, then one of them replaced, in turn the first and the second; some twice."""
        bits, experts, top_k = self.weights.bits, self.layer.experts, self.layer.top_k
        slots = self.tokens * top_k
        block = choose_tokens(device, slots, experts)
        up, down = (
            choose_vector(device, bits, n, atoms, top_k)
            if self.tokens == 1
            else choose_matrix(device, bits, n, atoms, slots, experts, block)
            for n, atoms in self._products
        )
        yield up, down
        shares = top_k if self.tokens == 1 else round(slots / slots_per_expert(slots, experts))
        for recipe in recipes(bits, self.tokens):
            (up_n, up_atoms), (down_n, down_atoms) = self._products
            for tile in fitted(recipe, device, -(-up_n // recipe.rows) * shares, up_atoms):
                yield tile, down
            for tile in fitted(recipe, device, -(-down_n // recipe.rows) * shares, down_atoms):
                yield up, tile

    def small(self) -> Experts:
        """A case of the same kernels, as :meth:`Dense.small`."""
        layer = self.layer
        sizes = {"experts": min(layer.experts, 16), "hidden": min(layer.hidden, 2048), "inner": min(layer.inner, 2048)}
        return replace(self, layer=replace(layer, **sizes))

    def prepared(self, is_cold: bool) -> Run:
        """Random weights and routing, and copies of the weights if the L2 cache is to be cold."""
        first = random_experts(self.layer, self.weights)
        copies = max(1, int(COLD_BYTES // (bytes_per_expert(first) * self.layer.top_k)) // 2) if is_cold else 0
        modules = [first] + [copy.deepcopy(first) for _ in range(copies)]
        inputs = [random_inputs(self.layer, self.tokens) for _ in range(16)]
        return lambda i: modules[i % len(modules)](*inputs[i % len(inputs)])

    @contextmanager
    def using(self, tiles: Tiles) -> Iterator[None]:
        """With these tiles instead of the chosen."""
        wide = self._products[0][0]

        def pick(device: Device, bits: int, n: int, *_: int) -> Tile:
            return tiles[0] if n == wide else tiles[1]

        ops.launches_for.cache_clear()
        vectors = mock.patch.object(ops, "choose_vector", pick)
        matrices = mock.patch.object(launches, "choose_matrix", pick)
        with vectors, matrices:
            yield
        ops.launches_for.cache_clear()


Case = Dense | Experts

SHAPES = ((8192, 8192), (14336, 4096), (4096, 28672), (4096, 4096))
DENSE = tuple(
    Dense(bits, *shape, tokens)
    for bits, tokens, shapes in (
        (4, 64, SHAPES), (3, 1, SHAPES), (4, 1, SHAPES), (4, 16, SHAPES), (3, 16, SHAPES), (4, 128, SHAPES),
        (8, 1, SHAPES[:2]),
    )
    for shape in shapes
)  # fmt: skip
MIXTRAL, QWEN3 = LAYERS
EXPERTS = (
    Experts(MIXTRAL, MAIN, 1),
    Experts(MIXTRAL, replace(MAIN, bits=3), 1),
    Experts(MIXTRAL, MAIN, 4),
    Experts(MIXTRAL, MAIN, 2),
    Experts(QWEN3, MAIN, 1),
)
TINY_CASES = (
    Dense(4, 256, 128, 1),
    Dense(3, 256, 128, 16),
    Dense(4, 256, 128, 64),
    Experts(TINY, MAIN, 1),
    Experts(TINY, replace(MAIN, bits=3), 2),
)
