"""Values of packed tensors: flipped bits, groups out of range, scales that are no numbers."""

from __future__ import annotations

import random

import numpy as np

from fuzz.checkpoint import Checkpoint, Stored
from fuzz.registry import mutation


def _some(checkpoint: Checkpoint, generator: random.Random, suffix: str) -> str:
    return f"{generator.choice(checkpoint.packed())}.{suffix}"


def _flip(checkpoint: Checkpoint, generator: random.Random, suffix: str) -> None:
    name = _some(checkpoint, generator, suffix)
    content = checkpoint.shard_with(name)
    data = bytearray(content[name].data)
    for _ in range(generator.choice([1, 1, 3, 20])):
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    content[name] = Stored(content[name].dtype, content[name].shape, bytes(data))


@mutation("bit flips")
def in_codes(checkpoint: Checkpoint, generator: random.Random) -> None:
    _flip(checkpoint, generator, "qweight")


@mutation("bit flips")
def in_scales(checkpoint: Checkpoint, generator: random.Random) -> None:
    _flip(checkpoint, generator, "scales")


@mutation("bit flips", sym=False)
def in_zero_points(checkpoint: Checkpoint, generator: random.Random) -> None:
    _flip(checkpoint, generator, "qzeros")


@mutation("bit flips", sym=True)
def in_symmetric_zero_points(checkpoint: Checkpoint, generator: random.Random) -> None:
    _flip(checkpoint, generator, "qzeros")


@mutation("bit flips")
def in_g_idx(checkpoint: Checkpoint, generator: random.Random) -> None:
    _flip(checkpoint, generator, "g_idx")


@mutation("bit flips")
def random_codes(checkpoint: Checkpoint, generator: random.Random) -> None:
    name = _some(checkpoint, generator, "qweight")
    content = checkpoint.shard_with(name)
    content[name] = Stored("I32", content[name].shape, generator.randbytes(len(content[name].data)))


@mutation("bit flips", sym=False)
def random_zero_points(checkpoint: Checkpoint, generator: random.Random) -> None:
    name = _some(checkpoint, generator, "qzeros")
    content = checkpoint.shard_with(name)
    content[name] = Stored("I32", content[name].shape, generator.randbytes(len(content[name].data)))


@mutation("bit flips")
def in_plain_tensors(checkpoint: Checkpoint, generator: random.Random) -> None:
    """The mantissa of one weight that is not packed."""
    name = generator.choice(sorted(name for name in checkpoint.plain if name.endswith("norm.weight")))
    checkpoint.change(name, lambda array: array * np.where(np.arange(array.size) == 3, 1.5, 1).astype(array.dtype))


@mutation("zero points", sym=False)
def highest(checkpoint: Checkpoint, generator: random.Random) -> None:
    """Stored as all ones: AutoGPTQ adds one without masking."""
    checkpoint.change(_some(checkpoint, generator, "qzeros"), lambda array: np.full_like(array, -1))


@mutation("zero points", sym=False)
def lowest(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.change(_some(checkpoint, generator, "qzeros"), np.zeros_like)


@mutation("zero points", sym=True)
def other_format_in_all(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "nothing"
    sym = generator.choice([True, False, None])
    for parameters in checkpoint.parameters():
        parameters["sym"] = sym
    middle = 2 ** (checkpoint.bits - 1) - (1 - checkpoint.zero_offset)
    stream = np.array([middle] * 32, dtype=np.uint64)
    bits = (stream[:, None] >> np.arange(checkpoint.bits, dtype=np.uint64)) & 1
    words = np.packbits(bits.astype(np.uint8).reshape(-1), bitorder="little").view(np.int32)
    for module in checkpoint.packed():
        checkpoint.change(f"{module}.qzeros", lambda array: np.resize(words, array.shape).astype(np.int32))


@mutation("zero points", sym=True)
def declared_asymmetric(checkpoint: Checkpoint, generator: random.Random) -> None:
    for parameters in checkpoint.parameters():
        parameters["sym"] = False


@mutation("zero points", sym=False)
def declared_symmetric(checkpoint: Checkpoint, generator: random.Random) -> None:
    for parameters in checkpoint.parameters():
        parameters["sym"] = True


@mutation("groups")
def out_of_range(checkpoint: Checkpoint, generator: random.Random) -> None:
    def change(array: np.ndarray) -> None:
        array[generator.randrange(len(array))] = generator.choice([-1, 3 + len(array), 2**31 - 1, -(2**31), 100])

    checkpoint.change(_some(checkpoint, generator, "g_idx"), change)


@mutation("groups", group_size=32)
def permuted(checkpoint: Checkpoint, generator: random.Random) -> None:
    order = generator.random()
    checkpoint.change(
        _some(checkpoint, generator, "g_idx"),
        lambda array: np.random.default_rng(int(order * 2**32)).permutation(array),
    )


@mutation("groups", group_size=32)
def uneven(checkpoint: Checkpoint, generator: random.Random) -> None:
    """Groups of other sizes, some of them empty."""
    checkpoint.change(
        _some(checkpoint, generator, "g_idx"), lambda array: np.where(array == 0, 1, array).astype(np.int32)
    )


@mutation("groups", desc_act=False)
def missing_in_one(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.drop(_some(checkpoint, generator, "g_idx"))


@mutation("groups", desc_act=False)
def missing_in_all(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.must_load = True
    for module in checkpoint.packed():
        checkpoint.drop(f"{module}.g_idx")


@mutation("groups", desc_act=False)
def zeros_in_all(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.must_load = True
    for module in checkpoint.packed():
        checkpoint.change(f"{module}.g_idx", np.zeros_like)


@mutation("groups", desc_act=True)
def missing_though_ordered(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "nothing"
    checkpoint.drop(_some(checkpoint, generator, "g_idx"))


@mutation("groups", desc_act=True)
def zeros_though_ordered(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "nothing"
    checkpoint.change(_some(checkpoint, generator, "g_idx"), np.zeros_like)


@mutation("groups")
def other_type(checkpoint: Checkpoint, generator: random.Random) -> None:
    kind = generator.choice([np.int64, np.int16, np.int8, np.float32, np.float16])
    checkpoint.change(_some(checkpoint, generator, "g_idx"), lambda array: array.astype(kind))


@mutation("groups")
def other_length(checkpoint: Checkpoint, generator: random.Random) -> None:
    change = generator.choice([lambda a: a[:-1], lambda a: np.append(a, 0), lambda a: a[:0], lambda a: np.tile(a, 2)])
    checkpoint.change(_some(checkpoint, generator, "g_idx"), lambda array: change(array).astype(np.int32))


def _scales(checkpoint: Checkpoint, generator: random.Random, values: list[float], kind: str = "F32") -> None:
    """Put one of the values into one scale, or into all of a module; ``kind`` is what they are stored in afterwards."""
    name = _some(checkpoint, generator, "scales")
    content = checkpoint.shard_with(name)
    array = content[name].floats()
    value, whole = generator.choice(values), generator.random() < 0.3
    array.reshape(-1)[slice(None) if whole else generator.randrange(array.size)] = value
    content[name] = Stored.of(array.astype(np.float16 if kind == "F16" else np.float32))


@mutation("scales")
def no_numbers(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "nothing"
    _scales(checkpoint, generator, [float("nan"), float("inf"), float("-inf")], generator.choice(["F32", "F16"]))


@mutation("scales")
def enormous(checkpoint: Checkpoint, generator: random.Random) -> None:
    """What overflows has no meaning; what does not is read as it stands."""
    _scales(checkpoint, generator, [1e30, 3e38, -1e30, 1e36])


@mutation("scales")
def large(checkpoint: Checkpoint, generator: random.Random) -> None:
    _scales(checkpoint, generator, [65504.0, 1000.0, -60000.0], "F16")


@mutation("scales")
def negative(checkpoint: Checkpoint, generator: random.Random) -> None:
    _scales(checkpoint, generator, [-0.01, -0.5, -1e-6])


@mutation("scales")
def zero_or_tiny(checkpoint: Checkpoint, generator: random.Random) -> None:
    _scales(checkpoint, generator, [0.0, -0.0, 1e-40, 6e-8])


@mutation("scales")
def other_float_type(checkpoint: Checkpoint, generator: random.Random) -> None:
    name = _some(checkpoint, generator, "scales")
    content = checkpoint.shard_with(name)
    kind = generator.choice([np.float64, np.float32, np.float16, np.int32, np.uint8])
    content[name] = Stored.of(content[name].floats().astype(kind))


@mutation("scales", bits=4)
def overflow_in_half_precision(checkpoint: Checkpoint, generator: random.Random) -> None:
    """Scales that float16 has, and products that it has not."""
    checkpoint.accept = "nothing"
    checkpoint.config["dtype"] = "float16"
    checkpoint.change(
        _some(checkpoint, generator, "scales"), lambda array: np.full(array.shape, 60000, dtype=np.float16)
    )
