"""Quantizes a whole model in memory."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from graftq.adapters.transformers.making.blocks import check_chain, find_blocks, input_after, record_calls
from graftq.adapters.transformers.making.calibration import batches, fingerprint
from graftq.adapters.transformers.making.engine import (
    BlockResult,
    Made,
    Step,
    Streams,
    ignore,
    quantize_block,
    quantize_layer,
)
from graftq.adapters.transformers.making.names import Naming
from graftq.adapters.transformers.making.options import Options
from graftq.adapters.transformers.making.report import Row
from graftq.adapters.transformers.making.stages import unfit
from graftq.adapters.transformers.making.units import matrix


@dataclass
class ModelResult:
    """What became of a model.

    Attributes:
        made: Packed projections by stored name.
        rows: Of the report.
        parameters: What the configuration says.
    """

    made: dict[str, Made] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    parameters: dict[str, Any] = field(default_factory=dict)


@torch.no_grad()
def quantize_model(model: Any, rows: list[torch.Tensor], options: Options, step: Step = ignore) -> ModelResult:
    """Quantize a float model's blocks; its weights become what the packed ones stand for.

    Args:
        model: A language model, all of it on devices (nothing offloaded).
        rows: Calibration data, from :func:`token_rows`.
        options: How.
        step: Told what is being done, before it is.

    Raises:
        ValueError: if the model cannot be quantized block by block, or a value is NaN or infinite.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("weights are offloaded; a model is quantized in memory")
    model.eval()
    name, blocks = find_blocks(model, options.blocks)
    head = output_embedding(model, options.method.group_size) if options.lm_head else ""
    naming = Naming(model)
    if options.modules is not None:
        check_modules(blocks, options.modules)
    device = next(blocks[0].parameters()).device
    data = list(batches(rows, options.batch_size, device))
    check_chain(model, name, blocks, data[0][:1])
    recorded = [record_calls(model, blocks, batch) for batch in data]
    hidden = [first for first, _ in recorded]
    follows = options.method.drift > 0
    streams = Streams([], hidden, list(hidden) if follows else None)
    result = ModelResult()
    skipped: dict[str, str] = {}
    for number, block in enumerate(blocks):
        streams.calls = [calls[number] for _, calls in recorded]
        done = quantize_block(block, f"{name}.{number}", streams, options, step, (number, len(blocks)))
        _add(result, done, naming)
        skipped.update(done.skipped)
    if head:
        _add(result, quantize_head(model, blocks, data, head, streams, options), naming)
    if not result.made:
        reasons = "; ".join(sorted(set(skipped.values()))[:3])
        raise ValueError(f"{type(model).__name__}: nothing in its blocks can be quantized ({reasons})")
    warn_of_skipped(skipped)
    is_ordered = any(one.spec.desc_act for one in result.made.values())
    left = [naming.plain(target) for target in skipped]
    tokens = sum(map(len, rows))
    warn_of_few(tokens, max(one.spec.in_features for one in result.made.values()))
    result.parameters = options.parameters(is_ordered, left, tokens, fingerprint(rows))
    return result


def check_modules(blocks: Sequence[nn.Module], names: Iterable[str]) -> None:
    """Make sure that every name is that of a module in some block.

    Raises:
        ValueError: naming the first that is not.
    """
    known = {name for block in blocks for name, _ in block.named_modules()}
    for name in names:
        if name not in known:
            raise ValueError(f"{name}: no such module in the blocks of this model")


def output_embedding(model: Any, group_size: int) -> str:
    """The name of the output embedding.

    Raises:
        ValueError: if there is none, if its shape cannot be stored, or if it is the input embedding, which stays float.
    """
    head = model.get_output_embeddings()
    inputs = model.get_input_embeddings()
    if head is None:
        raise ValueError(f"lm_head: {type(model).__name__} has no output embedding")
    if head.weight is getattr(inputs, "weight", None):
        raise ValueError("lm_head: the output embedding is tied to the input embedding, which stays a float one")
    name = next(name for name, module in model.named_modules() if module is head)
    if reason := unfit(matrix(head).shape, group_size):
        raise ValueError(f"{name}: {reason}")
    return name


def quantize_head(
    model: Any,
    blocks: Sequence[nn.Module],
    data: Sequence[torch.Tensor],
    name: str,
    streams: Streams,
    options: Options,
) -> BlockResult:
    """Quantize the output embedding in place.

    Args:
        model: The model, of which only what comes after the blocks is run.
        blocks: Its blocks.
        data: The batches of ids, int64 [rows, tokens] each.
        name: From :func:`output_embedding`.
        streams: The hidden states behind the last block; they are used up.
        options: How.
    """
    for each in (streams.made, streams.float):
        if each is not None:
            each[:] = [
                input_after(model, blocks, batch, x, model.get_submodule(name))
                for batch, x in zip(data, each, strict=True)
            ]
    return quantize_layer(model, name, streams, options)


def _add(result: ModelResult, done: BlockResult, naming: Naming) -> None:
    for one in done.made:
        result.made[naming.stored(one.target, one.container)] = one
    result.rows += done.rows


def warn_of_few(tokens: int, width: int) -> None:
    """Warn if there are fewer calibration tokens than inputs of the widest layer."""
    if tokens < width:
        warnings.warn(
            f"{tokens} calibration tokens for layers of {width} inputs: take {16 * width} or more", stacklevel=3
        )


def warn_of_skipped(skipped: dict[str, str]) -> None:
    """Warn once of layers that nobody would expect to be left out."""
    lost = {name: reason for name, reason in skipped.items() if "multiple" in reason}
    if lost:
        name, reason = next(iter(lost.items()))
        warnings.warn(f"{len(lost)} layers stay float, {name} among them: {reason}", stacklevel=3)
