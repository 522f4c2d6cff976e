"""Weights as pickles, which the user has allowed: what is no flat dict of tensors is refused."""

from __future__ import annotations

import random
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fuzz.checkpoint import Checkpoint, Stored
from fuzz.registry import mutation

TORCH_TYPES = {"I32": torch.int32, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


def _state(checkpoint: Checkpoint) -> dict[str, Any]:
    tensors = {name: tensor for content in checkpoint.shards.values() for name, tensor in content.items()}
    return {name: _tensor(tensor) for name, tensor in tensors.items()}


def _tensor(stored: Stored) -> torch.Tensor:
    return torch.frombuffer(bytearray(stored.data), dtype=TORCH_TYPES[stored.dtype]).reshape(stored.shape)


def _write(checkpoint: Checkpoint, generator: random.Random, content: Any, **options: Any) -> None:
    """Put the pickle in the place of all weight files; the user allows it, mostly."""
    checkpoint.accept = "base"
    checkpoint.shards, checkpoint.index = {}, None
    name = generator.choice(["pytorch_model.bin", "gptq_model.pt", "model.bin", "weights.pth"])
    if generator.random() < 0.9:
        checkpoint.arguments["use_safetensors"] = False

    def finish(folder: Path) -> None:
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            torch.save(content, folder / name, **options)

    checkpoint.finish.append(finish)


@mutation("pickles")
def good(checkpoint: Checkpoint, generator: random.Random) -> None:
    _write(checkpoint, generator, _state(checkpoint))


@mutation("pickles")
def ordered_or_old(checkpoint: Checkpoint, generator: random.Random) -> None:
    old = generator.random() < 0.5
    _write(checkpoint, generator, OrderedDict(_state(checkpoint)), _use_new_zipfile_serialization=not old)


@mutation("pickles")
def parameters(checkpoint: Checkpoint, generator: random.Random) -> None:
    state = {name: torch.nn.Parameter(tensor, requires_grad=False) for name, tensor in _state(checkpoint).items()}
    _write(checkpoint, generator, state)


@mutation("pickles")
def nested(checkpoint: Checkpoint, generator: random.Random) -> None:
    state = _state(checkpoint)
    _write(
        checkpoint,
        generator,
        generator.choice([{"model": state}, {"state_dict": state, "epoch": 3}, [state], (state,)]),
    )


@mutation("pickles")
def no_dict(checkpoint: Checkpoint, generator: random.Random) -> None:
    _write(checkpoint, generator, generator.choice([None, 4, "x", [], {}, torch.zeros(3), {1: 2}, {None: None}]))


@mutation("pickles")
def other_keys(checkpoint: Checkpoint, generator: random.Random) -> None:
    _write(checkpoint, generator, {**_state(checkpoint), generator.choice([1, None, ("a", "b"), 0.5]): torch.zeros(3)})


@mutation("pickles")
def other_values(checkpoint: Checkpoint, generator: random.Random) -> None:
    values = [None, 4, "x", [torch.zeros(2)], {"a": torch.zeros(2)}, torch.Size([3]), torch.float16, True]
    state = _state(checkpoint)
    name = generator.choice([*sorted(state), "epoch", "x.qweight"])
    _write(checkpoint, generator, {**state, name: generator.choice(values)})


@mutation("pickles")
def strange_tensors(checkpoint: Checkpoint, generator: random.Random) -> None:
    state = _state(checkpoint)
    name = generator.choice([*sorted(state), "x"])
    odd = [
        torch.zeros(3, 3).to_sparse(),
        torch.zeros(3, 3, dtype=torch.complex64),
        torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        torch.empty(3, 3, device="meta"),
        torch.zeros(()),
        torch.zeros(0),
        torch.zeros(3, dtype=torch.bool),
    ]
    _write(checkpoint, generator, {**state, name: generator.choice(odd)})


@mutation("pickles")
def views(checkpoint: Checkpoint, generator: random.Random) -> None:
    """Not contiguous, or parts of one storage."""
    state = {name: tensor.t().contiguous().t() for name, tensor in _state(checkpoint).items()}
    _write(checkpoint, generator, state)


@mutation("pickles")
def objects(checkpoint: Checkpoint, generator: random.Random) -> None:
    odd = [np.zeros(3), Path("x"), torch.nn.Linear(2, 2), slice(1, 2), random.Random(1)]
    _write(checkpoint, generator, {**_state(checkpoint), "x": generator.choice(odd)})


@mutation("pickles")
def no_pickle(checkpoint: Checkpoint, generator: random.Random) -> None:
    _write(
        checkpoint,
        generator,
        generator.choice([b"", b"\x80", b"x", b"PK\3\4", b"\0" * 4096, b"\x80\x04N.", b"PK\5\6" + b"\0" * 18]),
    )
