"""The blocks of a model, and what each is called with besides the hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import nn


@dataclass
class Call:
    """One call of a block: ``block(hidden, *rest, **named)``, with ``hidden`` to be filled in.

    Attributes:
        rest: Positional arguments after the hidden states.
        named: Keyword arguments; the hidden states are among them if ``by_name`` says so.
        by_name: The hidden states' keyword, or "" where they are the first argument.
    """

    rest: tuple[Any, ...]
    named: dict[str, Any]
    by_name: str = ""

    def run(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """The block's hidden states for these."""
        if self.by_name:
            return hidden_of(block(*self.rest, **{**self.named, self.by_name: hidden}))
        return hidden_of(block(hidden, *self.rest, **self.named))


def hidden_of(output: Any) -> torch.Tensor:
    """The hidden states in what a block returns."""
    return output[0] if isinstance(output, (tuple, list)) else output


def find_blocks(model: Any, name: str | None = None) -> tuple[str, list[nn.Module]]:
    """The decoder's blocks and the name of their list in the model.

    Args:
        model: A language model, or one with a language model in it: other towers stay as they are.
        name: The list's name, if the caller knows it.

    Raises:
        ValueError: if there is no such list.
    """
    if name is not None:
        found = dict(model.named_modules()).get(name)
        if not isinstance(found, nn.ModuleList) or not len(found):
            raise ValueError(f"{name!r} is no list of blocks in this model")
        return name, list(found)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    decoder = model if decoder is None else decoder
    lists = [
        (name, module) for name, module in decoder.named_modules() if isinstance(module, nn.ModuleList) and len(module)
    ]
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of blocks that could be quantized one by one")
    largest = max((module for _, module in lists), key=lambda module: sum(p.numel() for p in module.parameters()))
    return next(name for name, module in model.named_modules() if module is largest), list(largest)


class _Enough(Exception):
    """Ends a forward pass where nothing after it matters."""


def record_calls(model: Any, blocks: Sequence[nn.Module], batch: torch.Tensor) -> tuple[torch.Tensor, list[Call]]:
    """What the first block gets for a batch of ids, and how every block is called.

    The blocks themselves do not run: each hands its hidden states on. What they get besides (masks, positions) does
    not depend on these.

    Args:
        model: The model.
        blocks: Its blocks.
        batch: int64 [rows, tokens].
    """
    first: list[torch.Tensor] = []
    calls: list[Call] = []

    def stand_in(block: nn.Module, is_last: bool, wraps: bool) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            by_name = "" if args else "hidden_states"
            hidden = args[0] if args else kwargs[by_name]
            if not first:
                first.append(hidden)
            calls.append(Call(args[1:], {key: kwargs[key] for key in kwargs if key != by_name}, by_name))
            if is_last:
                raise _Enough
            return (hidden,) if wraps else hidden

        return mock.patch.object(block, "forward", forward)

    for wraps in (False, True):  # whether blocks return the hidden states, or a tuple of these and more
        first.clear()
        calls.clear()
        with ExitStack() as stack:
            for block in blocks:
                stack.enter_context(stand_in(block, block is blocks[-1], wraps))
            try:
                model(input_ids=batch, use_cache=False)
            except _Enough:
                if len(calls) == len(blocks) and calls and _keeps_shape(first[0], batch):
                    return first[0], calls
            except (IndexError, TypeError, ValueError, AttributeError, RuntimeError):
                if wraps:
                    raise
    raise ValueError(f"{type(model).__name__} does not run its blocks one after the other, so they cannot be quantized")


def _keeps_shape(hidden: torch.Tensor, batch: torch.Tensor) -> bool:
    return hidden.ndim == 3 and hidden.shape[:2] == batch.shape


@torch.no_grad()
def check_chain(model: Any, name: str, blocks: Sequence[nn.Module], batch: torch.Tensor) -> None:
    """Make sure that blocks, run one by one, give what the model gives.

    Raises:
        ValueError: if something happens between them, or if a value is not a number.
    """
    last: list[torch.Tensor] = []
    handle = blocks[-1].register_forward_hook(lambda module, args, output: last.append(hidden_of(output)))
    try:
        model(input_ids=batch, use_cache=False)
    finally:
        handle.remove()
    hidden, calls = record_calls(model, blocks, batch)
    for number, (block, call) in enumerate(zip(blocks, calls, strict=True)):
        hidden = call.run(block, hidden)
        if not bool(torch.isfinite(hidden).all()):
            raise ValueError(f"{name}.{number}: NaN or infinite values after it, in the float model")
    distance = float((hidden.float() - last[0].float()).norm())
    if not distance <= 2e-2 * float(last[0].float().norm()):
        raise ValueError(
            f"{type(model).__name__}: its blocks, run one by one, do not give what the model gives "
            f"(distance {distance:.3g}); it cannot be quantized block by block"
        )


def input_after(model: Any, blocks: Sequence[nn.Module], batch: torch.Tensor, hidden: torch.Tensor, module: nn.Module):
    """What ``module``, which comes after the blocks, gets if these return ``hidden``: [rows, tokens, K]."""
    for answer in (hidden, (hidden,)):
        with ExitStack() as stack:
            for block in blocks:
                stack.enter_context(mock.patch.object(block, "forward", lambda *a, _answer=answer, **k: _answer))
            try:
                args, kwargs = input_of(module, lambda: model(input_ids=batch, use_cache=False))
            except (IndexError, TypeError, ValueError, AttributeError, RuntimeError):
                continue
        x = args[0] if args else next(iter(kwargs.values()))
        if x.shape[:2] == batch.shape:
            return x
    raise ValueError(f"a {type(module).__name__} after the blocks is not called, or not for every token")


def input_of(module: nn.Module, run: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a module's first call within ``run()``, which ends there.

    Raises:
        ValueError: if it is not called.
    """
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))
        raise _Enough

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        run()
    except _Enough:
        return seen[0]
    finally:
        handle.remove()
    raise ValueError(f"a {type(module).__name__} that was called for one batch is not called for another")
