"""Which tensors there are, and their shapes: layers missing or left over, padding, heads packed and plain."""

from __future__ import annotations

import random

import numpy as np

from fuzz.checkpoint import NUMPY_TYPES, Checkpoint, Stored
from fuzz.registry import mutation

SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")


def _module(checkpoint: Checkpoint, generator: random.Random) -> str:
    return generator.choice(checkpoint.packed())


def _copy(checkpoint: Checkpoint, source: str, target: str) -> None:
    for suffix in SUFFIXES:
        checkpoint.put(f"{target}.{suffix}", checkpoint.shard_with(f"{source}.{suffix}")[f"{source}.{suffix}"])


@mutation("layers")
def tensor_missing(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "nothing"
    checkpoint.drop(f"{_module(checkpoint, generator)}.{generator.choice(SUFFIXES[:3])}")


@mutation("layers")
def module_missing(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "nothing"
    module = _module(checkpoint, generator)
    for suffix in SUFFIXES:
        checkpoint.drop(f"{module}.{suffix}")


@mutation("layers")
def plain_tensor_missing(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "nothing"
    checkpoint.drop(generator.choice(sorted(checkpoint.plain)))


@mutation("layers")
def layer_too_many(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "nothing"
    source = _module(checkpoint, generator)
    targets = [source.replace("layers.1", "layers.2").replace("layers.0", "layers.7"), "model.extra", "extra.proj", "x"]
    _copy(checkpoint, source, generator.choice(targets))


@mutation("layers", architecture="mixtral")
def expert_too_many(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "nothing"
    source = generator.choice([module for module in checkpoint.packed() if ".experts.3." in module])
    number = generator.choice(["4", "99", "-1", "٤", "3.0"])
    _copy(checkpoint, source, source.replace(".experts.3.", f".experts.{number}."))


@mutation("layers", architecture="mixtral")
def expert_missing(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "nothing"
    number = generator.randrange(4)
    for module in [module for module in checkpoint.packed() if f".experts.{number}." in module]:
        for suffix in SUFFIXES:
            checkpoint.drop(f"{module}.{suffix}")


@mutation("layers")
def head_packed_and_plain(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "nothing"
    source = "model.layers.0.self_attn.q_proj"
    for suffix in SUFFIXES:
        stored = checkpoint.shard_with(f"{source}.{suffix}")[f"{source}.{suffix}"]
        if suffix != "g_idx":
            array = stored.array()
            stored = Stored.of(np.tile(array, 2)[:, : array.shape[1] * 96 // 64], stored.dtype)
        checkpoint.put(f"lm_head.{suffix}", stored)


@mutation("layers")
def packed_and_plain(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "nothing"
    module = _module(checkpoint, generator)
    checkpoint.put(f"{module}.weight", Stored.of(np.zeros(checkpoint.shapes[module], dtype=np.float32)))


@mutation("layers")
def plain_in_eight_bits(checkpoint: Checkpoint, generator: random.Random) -> None:
    """The scale beside it has no reader."""
    checkpoint.accept = "nothing"
    name = generator.choice(sorted(name for name in checkpoint.plain if "norm" not in name))
    shape = checkpoint.shard_with(name)[name].shape
    checkpoint.drop(name)
    codes = np.frombuffer(bytes(generator.choices(range(0x20, 0x40), k=int(np.prod(shape)))), dtype=np.uint8)
    checkpoint.put(name, Stored.of(codes.reshape(shape), generator.choice(["F8_E4M3", "F8_E5M2"])))
    ending = generator.choice(["_scale", "_scale_inv"])
    checkpoint.put(name + ending, Stored.of(np.full(1, 0.01, dtype=np.float32)))


@mutation("layers")
def plain_of_integers(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "nothing"
    name = generator.choice(sorted(name for name in checkpoint.plain if "norm" not in name))
    kind = generator.choice(["I8", "I32", "U8"])
    checkpoint.change(name, lambda array: (array * 100).astype(NUMPY_TYPES[kind]))
    checkpoint.put(f"{name}_scale", Stored.of(np.full(1, 0.01, dtype=np.float32)))


@mutation("layers")
def bias_where_the_model_has_none(checkpoint: Checkpoint, generator: random.Random) -> None:
    module = _module(checkpoint, generator)
    value = generator.choice([0.0, 0.5, -0.0])
    bias = np.full(checkpoint.shapes[module][0], value, dtype=np.float16)
    name = f"{module}.bias"
    if any(name in content for content in checkpoint.shards.values()):
        checkpoint.drop(name)
    checkpoint.put(name, Stored.of(bias))


@mutation("layers")
def plain_tensors_too_many(checkpoint: Checkpoint, generator: random.Random) -> None:
    name = generator.choice(["model.layers.0.self_attn.rotary_emb.inv_freq", "x", "model.x.weight", "y.scales.z"])
    checkpoint.put(name, Stored.of(np.ones(8, dtype=np.float32)))


@mutation("shapes")
def other_shape(checkpoint: Checkpoint, generator: random.Random) -> None:
    name = f"{_module(checkpoint, generator)}.{generator.choice(SUFFIXES)}"
    changes = [lambda a: a[:-1], lambda a: a[1:], lambda a: a.reshape(-1), lambda a: a[None], lambda a: a.T]
    changes += [lambda a: np.concatenate([a, a]), lambda a: a[..., :-1], lambda a: a[..., :1], lambda a: a[:0]]
    change = generator.choice(changes)
    checkpoint.change(name, lambda array: np.ascontiguousarray(change(array)))


@mutation("shapes")
def other_dtype(checkpoint: Checkpoint, generator: random.Random) -> None:
    name = f"{_module(checkpoint, generator)}.{generator.choice(SUFFIXES[:2])}"
    kind = generator.choice([np.int64, np.int16, np.float32, np.uint8])
    checkpoint.change(name, lambda array: array.astype(kind))


@mutation("shapes")
def seen_as_other_dtype(checkpoint: Checkpoint, generator: random.Random) -> None:
    name = f"{_module(checkpoint, generator)}.{generator.choice(SUFFIXES[:2])}"
    checkpoint.change(name, lambda array: array.view(generator.choice([np.int16, np.uint8, np.float32])))


@mutation("shapes")
def other_packing(checkpoint: Checkpoint, generator: random.Random) -> None:
    """AWQ packs along N, Marlin in tiles."""
    checkpoint.accept = "nothing"
    for module in checkpoint.packed():
        n, k = checkpoint.shapes[module]
        shape = generator.choice([(k, n * checkpoint.bits // 32), (k // 16, n * 16 * checkpoint.bits // 32)])
        checkpoint.change(
            f"{module}.qweight", lambda array, shape=shape: array.reshape(-1)[: shape[0] * shape[1]].reshape(shape)
        )


@mutation("shapes")
def columns_too_many(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "nothing"
    checkpoint.config["intermediate_size"] -= generator.choice([1, 2, 8, 16, 31, 32])


@mutation("shapes", architecture="llama")
def fewer_heads(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "nothing"
    checkpoint.config["num_key_value_heads"] = 1


def _pad_columns(checkpoint: Checkpoint, module: str, columns: int, is_lie: bool) -> None:
    """Repeat the first columns, with scales of zero unless this ``is_lie``."""
    for suffix, more in (("qweight", columns), ("scales", columns), ("qzeros", columns * checkpoint.bits // 32)):
        name = f"{module}.{suffix}"
        content = checkpoint.shard_with(name)
        array = content[name].array()
        added = np.resize(array.T, (more, array.shape[0])).T
        if suffix == "scales" and not is_lie:
            added = np.zeros_like(added)
        content[name] = Stored.of(np.concatenate([array, added], axis=1), content[name].dtype)


@mutation("shapes")
def columns_added(checkpoint: Checkpoint, generator: random.Random) -> None:
    """32 columns more, whose weights are zero; one of them may not be."""
    _pad_columns(checkpoint, _module(checkpoint, generator), 32, generator.random() < 0.5)


@mutation("shapes", group_size=128)
def columns_padded_to_the_group(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.must_load = True
    module = _module(checkpoint, generator)
    _pad_columns(checkpoint, module, 128 - checkpoint.shapes[module][0], False)


@mutation("shapes", group_size=128)
def rows_padded_to_the_group(checkpoint: Checkpoint, generator: random.Random) -> None:
    """More rows, which no input reaches; ``g_idx`` goes on for them, or has to be understood without."""
    checkpoint.must_load = generator.random() < 0.7
    module = _module(checkpoint, generator)
    more = 128 - checkpoint.shapes[module][1]
    added = np.zeros((more * checkpoint.bits // 32, checkpoint.shapes[module][0]), dtype=np.int32)
    checkpoint.change(f"{module}.qweight", lambda array: np.concatenate([array, added]))
    if checkpoint.must_load:
        checkpoint.change(f"{module}.g_idx", lambda array: np.zeros(128, dtype=np.int32))


@mutation("shapes", group_size=-1)
def rows_padded(checkpoint: Checkpoint, generator: random.Random) -> None:
    """32 rows more, which no input reaches."""
    name = f"{_module(checkpoint, generator)}.qweight"
    checkpoint.change(name, lambda array: np.concatenate([array, array[: checkpoint.bits]]))


@mutation("shapes")
def modules_exchanged(checkpoint: Checkpoint, generator: random.Random) -> None:
    """q and o of one shape exchange their names: valid, and another model."""
    for suffix in SUFFIXES:
        first, second = (f"model.layers.0.self_attn.{name}.{suffix}" for name in ("q_proj", "o_proj"))
        one, other = checkpoint.shard_with(first), checkpoint.shard_with(second)
        one[first], other[second] = other[second], one[first]
