"""Quantizes a block: unit by unit, each with the inputs that the quantized units before it give."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from graftq.adapters.transformers.making.blocks import Call
from graftq.adapters.transformers.making.options import Options
from graftq.adapters.transformers.making.report import Row
from graftq.adapters.transformers.making.stages import find_units
from graftq.adapters.transformers.making.units import Linears, Piece, Unit
from graftq.quant_linear.layouts import GptqTensors
from graftq.quant_linear.making.moments import Moments
from graftq.quant_linear.making.packed import pack
from graftq.quant_linear.making.solve import Solution, solve
from graftq.quant_linear.spec import QuantSpec

LARGEST_BATCH = 2**27
"""Numbers in the Hessians, or weights, of the layers that are solved for at once."""


Step = Callable[[str, float], Any]
"""Told what is being done, and after what share of everything, 0 to 1."""


def ignore(text: str, share: float) -> None:
    """Tells nobody."""


@dataclass(frozen=True)
class Made:
    """One packed projection.

    Attributes:
        target: Its name in the model.
        container: The experts module that holds it, or "".
        tensors: On the CPU, as stored.
        spec: Their description.
    """

    target: str
    container: str
    tensors: GptqTensors
    spec: QuantSpec


@dataclass
class Streams:
    """Hidden states before a block, batch by batch: in the model quantized so far, and in the float model.

    Attributes:
        calls: How the block is to be called with each.
        made: [rows, tokens, hidden] each.
        float: Likewise; the same tensors as long as nothing is quantized; None if they are not followed.
    """

    calls: list[Call]
    made: list[torch.Tensor]
    float: list[torch.Tensor] | None


@dataclass
class BlockResult:
    """What became of a block.

    Attributes:
        made: Its packed projections.
        rows: Of the report.
        skipped: Layers that were left as they are, and why, by name in the model.
    """

    made: list[Made]
    rows: list[Row]
    skipped: dict[str, str]


def quantize_block(
    block: nn.Module,
    name: str,
    streams: Streams,
    options: Options,
    step: Step = ignore,
    place: tuple[int, int] = (0, 1),
) -> BlockResult:
    """Quantize a block in place, and move the streams behind it.

    Its weights are afterwards what the packed ones stand for.

    Args:
        block: The block.
        name: Its name in the model.
        streams: The hidden states before it; afterwards those behind it.
        options: How.
        step: Told what is being done, and what share of all.
        place: The block's number, and the number of blocks.

    Raises:
        ValueError: if a value is NaN or infinite, naming the module.
        torch.OutOfMemoryError: naming the block, and what helps.
    """
    try:
        return _quantize_block(block, name, streams, options, step, place)
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(
            f"{name}: out of memory with {sum(x.shape[0] * x.shape[1] for x in streams.made)} calibration tokens; take "
            f"fewer or shorter rows, a smaller batch_size, or the CPU (device_map='cpu', --device cpu). {error}"
        ) from error


def _quantize_block(
    block: nn.Module, name: str, streams: Streams, options: Options, step: Step, place: tuple[int, int]
) -> BlockResult:
    original = copy.deepcopy(block) if streams.float is not None else None
    first = streams.calls[0]
    units = find_units(
        block, lambda: first.run(block, streams.made[0]), options.method.group_size, _inside(options.modules)
    )
    result = BlockResult([], [], {f"{name}.{own}": reason for own, reason in units.skipped.items()})
    stages = [[unit] for unit in units.found] if options.true_sequential else [units.found]
    for position, stage in enumerate(stages):
        step(f"{name}.{stage[0].name}", (place[0] + position / len(stages)) / place[1])
        with _named(name, stage):
            _observe(stage, block, original, streams)
            for unit in stage:
                _solve_unit(unit, block, name, options, result)
    are_finite = []
    for number, call in enumerate(streams.calls):
        if streams.float is not None and original is not None:
            streams.float[number] = call.run(original, streams.float[number])
        streams.made[number] = call.run(block, streams.made[number])
        are_finite.append(torch.isfinite(streams.made[number]).all())
    answers = torch.stack(are_finite).tolist()  # of all batches at once, as a GPU is waited for here
    if not all(answers):
        number = answers.index(False)
        raise ValueError(f"{name}: NaN or infinite values after it, in batch {number} of the calibration data")
    return result


@contextmanager
def _named(block: str, stage: list[Unit]) -> Iterator[None]:
    """Names the module in what is raised inside."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{f'{block}.{stage[0].name}' if stage else block}: {error}") from error


def _inside(modules: tuple[str, ...] | None) -> list[str] | None:
    return None if modules is None else list(modules)


def _observe(stage: list[Unit], block: nn.Module, original: nn.Module | None, streams: Streams) -> None:
    for number, call in enumerate(streams.calls):

        def run(call: Call = call, number: int = number) -> torch.Tensor:
            return call.run(block, streams.made[number])

        def run_float(call: Call = call, number: int = number) -> torch.Tensor:
            assert original is not None
            assert streams.float is not None
            return call.run(original, streams.float[number])

        for unit in stage:
            unit.observe(block, run, original, run_float if original is not None else None)
    for unit in stage:
        unit.sum_up()


def _solve_unit(unit: Unit, block: nn.Module, name: str, options: Options, result: BlockResult) -> None:
    moments, weight = unit.take(), unit.weight(block)
    pieces = unit.pieces(block)
    new = torch.empty_like(weight)
    for chosen, solution in solve_in_parts(weight, moments, options):
        for index in range(chosen.start, chosen.stop):
            new[index] = solution.weight(index - chosen.start).to(new.dtype)
        own = [piece for piece in pieces if chosen.start <= piece.index < chosen.stop]
        result.made += _packed(solution, own, chosen.start, name)
        errors = (solution.error / solution.nearest.clamp(min=1e-30)).tolist()
        notes = zip(errors, solution.damp.tolist(), solution.clipped.tolist(), strict=True)
        for index, (error, damp, clipped) in enumerate(notes, chosen.start):
            layer = f"{name}.{unit.name}".lstrip(".") + (f".{index}" if len(weight) > 1 else "")
            result.rows.append(Row(layer, int(moments.tokens[index]), error, damp, clipped))
    unit.put(block, new)


def solve_in_parts(weight: torch.Tensor, moments: Moments, options: Options) -> Iterator[tuple[slice, Solution]]:
    """Solve for as many of [batch, N, K] at once as memory allows."""
    batch, outputs, width = weight.shape
    step = max(1, LARGEST_BATCH // (max(outputs, width) * width))
    for first in range(0, batch, step):
        chosen = slice(first, min(first + step, batch))
        part = Moments(0, 0)
        part.gram, part.tokens = moments.gram[chosen], moments.tokens[chosen]
        part.drift = None if moments.drift is None else moments.drift[chosen]
        yield chosen, solve(weight[chosen], part, options.method)


def _packed(solution: Solution, pieces: list[Piece], first: int, name: str) -> list[Made]:
    """The pieces of a solution whose batch begins with the unit's layer ``first``; experts are packed side by side."""
    packed: dict[tuple[Any, ...], list[tuple[GptqTensors, QuantSpec]]] = {}
    prefix = f"{name}." if name else ""
    made = []
    for piece in pieces:
        rows = (piece.rows.start, piece.rows.stop, piece.rows.step)
        if rows not in packed:
            packed[rows] = pack(solution, piece.rows)
        tensors, spec = packed[rows][piece.index - first]
        if piece.bias is not None:
            spec = replace(spec, stored_bias=len(piece.bias))
            tensors = replace(tensors, bias=piece.bias.detach().clone().cpu())
        made.append(Made(prefix + piece.target, prefix + piece.container if piece.container else "", tensors, spec))
    return made


def quantize_layer(model: nn.Module, name: str, streams: Streams, options: Options) -> BlockResult:
    """Quantize one linear layer after the blocks, given its inputs."""
    unit = Linears([name])
    for number, x in enumerate(streams.made):
        unit.add(x, None if streams.float is None else streams.float[number])
    unit.sum_up()
    result = BlockResult([], [], {})
    _solve_unit(unit, model, "", options, result)
    return result
