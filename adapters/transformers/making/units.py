"""What is quantized together: linear layers that share their inputs, and the experts of a layer."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from graftq.adapters.transformers.making.blocks import input_of
from graftq.quant_linear.making.moments import Moments

Run = Callable[[], Any]
"""Runs a block on one batch."""

AT_ONCE = {"cuda": 2**26}
"""Numbers in the inputs that are added to moments at once, by type of device; each batch by itself on others."""


@dataclass(frozen=True)
class Piece:
    """One projection of a unit, as a checkpoint stores it.

    Attributes:
        target: Its name relative to the block; an expert's is ``experts.3.gate_proj``.
        rows: Its outputs among the unit's.
        index: Its place in the unit's batch.
        container: The experts module's name relative to the block, or "".
        bias: [N] or None.
    """

    target: str
    rows: slice
    index: int = 0
    container: str = ""
    bias: torch.Tensor | None = None


class Unit(Protocol):
    """Layers that are solved for at once."""

    @property
    def name(self) -> str:
        """What the report calls it."""

    def observe(self, block: nn.Module, run: Run, float_block: nn.Module | None, float_run: Run | None) -> None:
        """Add one batch's inputs to the moments, or let them wait."""

    def sum_up(self) -> None:
        """Add what waits, before any weight of the block changes."""

    def take(self) -> Moments:
        """The moments; they are forgotten here."""

    def weight(self, block: nn.Module) -> torch.Tensor:
        """[batch, N, K]."""

    def put(self, block: nn.Module, weight: torch.Tensor) -> None:
        """Replace the weights by others, [batch, N, K]."""

    def pieces(self, block: nn.Module) -> list[Piece]:
        """The projections."""


class Waiting:
    """Tokens of several batches, until adding them to moments is worth it.

    A sum of moments writes matrices of K x K, however few the tokens. On a GPU this can take longer than the products.
    """

    def __init__(self) -> None:
        self.held: list[tuple[torch.Tensor, ...]] = []

    def add(self, *tensors: torch.Tensor) -> None:
        """Hold a batch: tensors of [tokens, ...]."""
        self.held.append(tensors)

    def take(self, is_all: bool) -> tuple[torch.Tensor, ...]:
        """All that is held, joined; nothing if more is to come that there is room for."""
        last = [batch[-1] for batch in self.held]
        if not last or not (is_all or sum(x.numel() for x in last) >= AT_ONCE.get(last[0].device.type, 0)):
            return ()
        joined = tuple(torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*self.held, strict=True))
        self.held = []
        return joined


class Linears:
    """Linear layers (or ``Conv1D``) that get the same inputs."""

    def __init__(self, names: list[str]):
        self.names = names
        self.moments: Moments | None = None
        self.waiting = Waiting()

    @property
    def name(self) -> str:
        """The layers' names in short."""
        return "+".join([self.names[0], *(name.rpartition(".")[2] for name in self.names[1:])])

    def observe(self, block: nn.Module, run: Run, float_block: nn.Module | None, float_run: Run | None) -> None:
        """Add one batch."""
        x = _linear_input(block.get_submodule(self.names[0]), run)
        x_float = None
        if float_block is not None and float_run is not None:
            x_float = _linear_input(float_block.get_submodule(self.names[0]), float_run)
        self.add(x, x_float)

    def add(self, x: torch.Tensor, x_float: torch.Tensor | None) -> None:
        """Add inputs [..., K], in the quantized and in the float model."""
        x = x.reshape(-1, x.shape[-1])
        if self.moments is None:
            self.moments = Moments(1, x.shape[1], x.device, with_drift=x_float is not None)
        self.waiting.add(x, *([] if x_float is None else [x_float.reshape(x.shape)]))
        self.sum_up(is_all=False)

    def sum_up(self, is_all: bool = True) -> None:
        """Add what waits."""
        if rows := self.waiting.take(is_all):
            assert self.moments is not None
            self.moments.add(*rows)

    def take(self) -> Moments:
        """The moments."""
        assert self.moments is not None
        moments, self.moments = self.moments, None
        return moments

    def weight(self, block: nn.Module) -> torch.Tensor:
        """All layers' weights, one above the other."""
        return torch.cat([matrix(block.get_submodule(name)) for name in self.names])[None]

    def put(self, block: nn.Module, weight: torch.Tensor) -> None:
        """Split them up again."""
        for piece in self.pieces(block):
            layer: Any = block.get_submodule(piece.target)
            part = weight[0, piece.rows]
            layer.weight.copy_(part.T if isinstance(layer, Conv1D) else part)

    def pieces(self, block: nn.Module) -> list[Piece]:
        """One per layer."""
        found, first = [], 0
        for name in self.names:
            layer: Any = block.get_submodule(name)
            last = first + len(matrix(layer))
            found.append(Piece(name, slice(first, last), bias=layer.bias))
            first = last
        return found


def matrix(layer: Any) -> torch.Tensor:
    """A layer's weight, [N, K]."""
    return layer.weight.T if isinstance(layer, Conv1D) else layer.weight


def _linear_input(layer: nn.Module, run: Run) -> torch.Tensor:
    args, kwargs = input_of(layer, run)
    return args[0] if args else next(iter(kwargs.values()))


class Experts:
    """The first or the second projection of all experts of a layer, by transformers' experts interface.

    Args:
        name: The experts module's name relative to the block.
        is_down: Which of the two.
    """

    def __init__(self, name: str, is_down: bool):
        self.container = name
        self.is_down = is_down
        self.name = f"{name}.{'down' if is_down else 'up'}"
        self.moments: Moments | None = None
        self.waiting = Waiting()
        self.modules: list[Any] = []
        """In the quantized model, and in the float model if that is followed."""

    def observe(self, block: nn.Module, run: Run, float_block: nn.Module | None, float_run: Run | None) -> None:
        """Add one batch, each token to the experts that the quantized model sends it to."""
        experts: Any = block.get_submodule(self.container)
        hidden, index = _experts_input(experts, run)
        self.modules, streams = [experts], [hidden]
        if float_block is not None and float_run is not None:
            self.modules.append(float_block.get_submodule(self.container))
            streams.append(_experts_input(self.modules[1], float_run)[0])
        if self.moments is None:
            batch, _, width = stacked(experts, self.is_down).shape
            self.moments = Moments(batch, width, hidden.device, with_drift=len(streams) > 1)
        self.waiting.add(index, *streams)
        self.sum_up(is_all=False)

    def sum_up(self, is_all: bool = True) -> None:
        """Add what waits."""
        rows = self.waiting.take(is_all)
        if not rows:
            return
        assert self.moments is not None
        index, *streams = rows
        for expert, tokens in enumerate(_by_expert(index, len(self.moments.gram))):
            if not len(tokens):
                continue
            found = [x[tokens] for x in streams]
            if self.is_down:
                found = [_inner(each, expert, x) for each, x in zip(self.modules, found, strict=True)]
            self.moments.add(*found, index=expert)

    def take(self) -> Moments:
        """The moments, those of experts with few tokens leaning on all."""
        assert self.moments is not None
        moments, self.moments, self.modules = self.moments, None, []
        return moments.shrunk(moments.gram.shape[-1] / 4)

    def weight(self, block: nn.Module) -> torch.Tensor:
        """All experts' weights."""
        return stacked(block.get_submodule(self.container), self.is_down)

    def put(self, block: nn.Module, weight: torch.Tensor) -> None:
        """Write them back in the module's own arrangement."""
        stacked(block.get_submodule(self.container), self.is_down).copy_(weight)

    def pieces(self, block: nn.Module) -> list[Piece]:
        """One per expert and projection: gate and up are apart, as checkpoints store them."""
        experts: Any = block.get_submodule(self.container)
        outputs = stacked(experts, self.is_down).shape[1]
        rows = {"down_proj" if self.is_down else "up_proj": slice(0, outputs)}
        if not self.is_down and hasattr(experts, "gate_up_proj"):
            half = outputs // 2
            concatenated = experts.is_concatenated
            gate, up = (
                (slice(0, half), slice(half, outputs)) if concatenated else (slice(0, None, 2), slice(1, None, 2))
            )
            rows = {"gate_proj": gate, "up_proj": up}
        return [
            Piece(f"{self.container}.{expert}.{name}", which, expert, self.container)
            for expert in range(experts.num_experts)
            for name, which in rows.items()
        ]


def stacked(experts: Any, is_down: bool) -> torch.Tensor:
    """A view of all experts' weights, [num_experts, N, K]."""
    up = experts.gate_up_proj if hasattr(experts, "gate_up_proj") else experts.up_proj
    weight = experts.down_proj if is_down else up
    return weight.transpose(1, 2) if experts.is_transposed else weight


def _by_expert(index: torch.Tensor, experts: int) -> tuple[torch.Tensor, ...]:
    """Which tokens each expert gets, ascending, of a routing [tokens, top_k]; a GPU is waited for twice."""
    chosen = (torch.arange(experts, device=index.device)[:, None, None] == index.T).any(1)  # [experts, tokens]
    return chosen.nonzero()[:, 1].split(chosen.sum(1).tolist())


def _inner(experts: Any, expert: int, x: torch.Tensor) -> torch.Tensor:
    """What an expert's second projection gets for tokens ``x``."""
    is_gated = hasattr(experts, "gate_up_proj")
    bias = getattr(experts, "gate_up_proj_bias" if is_gated else "up_proj_bias", None) if experts.has_bias else None
    out = nn.functional.linear(x, stacked(experts, False)[expert], None if bias is None else bias[expert])
    return experts._apply_gate(out) if is_gated else experts.act_fn(out)


def _experts_input(experts: nn.Module, run: Run) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [tokens, hidden] and routing [tokens, top_k]."""
    args, kwargs = input_of(experts, run)
    names = list(inspect.signature(type(experts).forward).parameters)[1:]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    hidden, index = (given[name] for name in names[:2])
    if not isinstance(index, torch.Tensor) or index.is_floating_point():
        raise ValueError(f"{type(experts).__name__} is not routed as transformers' experts interface says")
    return hidden.reshape(-1, hidden.shape[-1]), index.reshape(-1, index.shape[-1])


@dataclass(frozen=True)
class Units:
    """What of a block is quantized.

    Attributes:
        found: In the order in which they are called.
        skipped: Names of layers that stay as they are, and why.
    """

    found: list[Unit]
    skipped: dict[str, str]
