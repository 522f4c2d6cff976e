"""The index of shards, and the shards that it names."""

from __future__ import annotations

import random

from fuzz.checkpoint import BESIDE, Checkpoint, Stored
from fuzz.registry import Function, mutation
from fuzz.values import HOSTILE, hostile

NAMES = [
    "",
    ".",
    "..",
    "../x.safetensors",
    "/etc/passwd",
    "a/b.safetensors",
    "x" * 300,
    "absent.safetensors",
    "\0",
    "\x1b[31m.safetensors",
]


def index(function: Function) -> Function:
    """Enter a mutation of the index."""
    return mutation("index", layout="sharded")(function)


@index
def hostile_index(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "base"
    checkpoint.index = generator.choice([value for value in HOSTILE if value is not None])


@index
def hostile_weight_map(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "base"
    checkpoint.index["weight_map"] = hostile(generator)


@index
def no_weight_map(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "base"
    del checkpoint.index["weight_map"]


@index
def hostile_metadata(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "base"
    checkpoint.index["metadata"] = hostile(generator)


@index
def no_metadata(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "base"
    del checkpoint.index["metadata"]


@index
def hostile_total_size(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "base"
    checkpoint.index["metadata"] = {"total_size": hostile(generator)}


@index
def hostile_shard(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "base"
    name = generator.choice(sorted(checkpoint.index["weight_map"]))
    checkpoint.index["weight_map"][name] = generator.choice([*NAMES, *HOSTILE, BESIDE, "config.json"])


@index
def tensor_in_the_other_shard(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "base"
    weights = checkpoint.index["weight_map"]
    name = generator.choice(sorted(weights))
    weights[name] = next(file for file in checkpoint.shards if file != weights[name])


@index
def tensor_without_entry(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "base"
    for name in generator.sample(sorted(checkpoint.index["weight_map"]), generator.choice([1, 5])):
        del checkpoint.index["weight_map"][name]


@index
def entry_without_tensor(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "base"
    name = generator.choice(["x", "", "model.layers.7.mlp.up_proj.qweight", "\x1b[31m", "x" * 5000, "lm_head.bias"])
    checkpoint.index["weight_map"][name] = next(iter(checkpoint.shards))


@index
def empty_shard(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "base"
    name = generator.choice(sorted(checkpoint.shards))
    checkpoint.rewrite[name] = lambda content: b""


@index
def shard_missing(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "nothing"
    del checkpoint.shards[generator.choice(sorted(checkpoint.shards))]


@index
def shard_not_in_the_index(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "base"
    lost = generator.choice(sorted(checkpoint.shards))
    weights = checkpoint.index["weight_map"]
    checkpoint.index["weight_map"] = {name: file for name, file in weights.items() if file != lost}


def _other_content(checkpoint: Checkpoint, generator: random.Random, names: list[str]) -> None:
    """Put these tensors, changed, into the shard where they do not belong."""
    for name in names:
        own = checkpoint.shard_with(name)
        other = next(content for content in checkpoint.shards.values() if content is not own)
        changed = bytearray(own[name].data)
        changed[generator.randrange(len(changed))] ^= 1
        other[name] = Stored(own[name].dtype, own[name].shape, bytes(changed))


@index
def two_contents(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "nothing"
    ending = generator.choice([".qweight", ".scales", ".g_idx", ".qzeros", "norm.weight", "embed_tokens.weight"])
    names = [name for name in checkpoint.index["weight_map"] if name.endswith(ending)]
    _other_content(checkpoint, generator, [generator.choice(names)])


@index
def same_content_twice(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "base"
    name = generator.choice(sorted(checkpoint.index["weight_map"]))
    own = checkpoint.shard_with(name)
    for content in checkpoint.shards.values():
        content[name] = own[name]


@index
def two_shapes(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "nothing"
    name = generator.choice([name for name in checkpoint.index["weight_map"] if name.endswith(".qweight")])
    own = checkpoint.shard_with(name)
    other = next(content for content in checkpoint.shards.values() if content is not own)
    other[name] = Stored(own[name].dtype, own[name].shape[::-1], own[name].data)


@index
def reordered(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.must_load = True
    weights = list(checkpoint.index["weight_map"].items())
    generator.shuffle(weights)
    checkpoint.index = {"weight_map": dict(weights), "x": [], "metadata": checkpoint.index["metadata"]}
