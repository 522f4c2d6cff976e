"""Names of tensors, modules and files that a terminal, a path or a pattern would take otherwise."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np

from fuzz.checkpoint import Checkpoint, Stored
from fuzz.registry import mutation

PARTS = (
    "\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07",
    "a\nb",
    "a\rgraftq: all is well",
    "\0",
    "\u202e",
    "\u2028",
    "../..",
    "a/b",
    "(.*",
    "",
    ".",
    "..",
    " ",
    "é",
    "x" * 20_000,
    "\ud800",
    "{module}",
    "%s",
    "__class__",
    "9" * 400,
)


def _rename(checkpoint: Checkpoint, old: str, new: str) -> None:
    content = checkpoint.shard_with(old)
    file = next(file for file, own in checkpoint.shards.items() if own is content)
    content[new] = content.pop(old)
    if checkpoint.index is not None:
        del checkpoint.index["weight_map"][old]
        checkpoint.index["weight_map"][new] = file


@mutation("names")
def module_renamed(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "nothing"
    module = generator.choice(checkpoint.packed())
    part = generator.choice(PARTS)
    new = generator.choice([part, f"{module}{part}", module.replace("layers.", f"layers.{part}"), f"{module}.{part}"])
    new = f"{module}x" if new == module else new
    for suffix in ("qweight", "qzeros", "scales", "g_idx"):
        _rename(checkpoint, f"{module}.{suffix}", f"{new}.{suffix}")


@mutation("names")
def packed_module_too_many(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "nothing"
    source = generator.choice(checkpoint.packed())
    part = generator.choice(PARTS)
    target = generator.choice([part, f"model.{part}", f"{source}.{part}"])
    for suffix in ("qweight", "qzeros", "scales", "g_idx"):
        name = f"{source}.{suffix}"
        checkpoint.put(f"{target}.{suffix}", checkpoint.shard_with(name)[name])


@mutation("names")
def tensor_renamed(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "nothing"
    module = generator.choice(checkpoint.packed())
    suffix = generator.choice(["qweight", "qzeros", "scales"])
    new = generator.choice(
        [suffix.upper(), f" {suffix}", f"{suffix}\n", f"{suffix}s", suffix[:-1], generator.choice(PARTS)]
    )
    _rename(checkpoint, f"{module}.{suffix}", f"{module}.{new}")


@mutation("names")
def plain_tensor_renamed(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "nothing"
    name = generator.choice(sorted(checkpoint.plain))
    _rename(checkpoint, name, generator.choice([f"{name}{generator.choice(PARTS)}x", f"x{generator.choice(PARTS)}"]))


@mutation("names")
def damaged_tensor_of_that_name(checkpoint: Checkpoint, generator: random.Random) -> None:
    """So that its name reaches a message."""
    checkpoint.accept = "nothing"
    target = f"model.layers.0.{generator.choice(PARTS)}"
    checkpoint.put(f"{target}.qweight", Stored.of(np.zeros((3, 5), dtype=np.int32)))


@mutation("names", architecture="mixtral")
def expert_renamed(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "nothing"
    module = generator.choice([module for module in checkpoint.packed() if ".experts." in module])
    head, _, own = module.rpartition(".")
    number = generator.choice(["00", "²", "٤", "1e0", "-0", "9" * 400, "x"])
    new = generator.choice([f"{head}.{own}x", f"{head.rpartition('.')[0]}.{number}.{own}", f"{head}.{own.upper()}"])
    for suffix in ("qweight", "qzeros", "scales", "g_idx"):
        _rename(checkpoint, f"{module}.{suffix}", f"{new}.{suffix}")


@mutation("names", layout="AutoGPTQ's")
def file_renamed(checkpoint: Checkpoint, generator: random.Random) -> None:
    """The only file there is, whatever its name."""
    checkpoint.accept = "base"
    (content,) = checkpoint.shards.values()
    names = [
        "\x1b[31m",
        "a b",
        "é",
        "weights(.*",
        "x" * 200,
        "-rf",
        "model.layers",
        "adapter_model",
        "consolidated",
        "%s",
    ]
    checkpoint.shards = {f"{generator.choice(names)}.safetensors": content}


@mutation("names", layout="AutoGPTQ's")
def two_files_and_nothing_says_which(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "nothing"
    (content,) = checkpoint.shards.values()
    checkpoint.shards = {
        f"{name}.safetensors": content for name in ("one", generator.choice(["two", "\x1b[31m", "a b"]))
    }


@mutation("names", layout="AutoGPTQ's")
def path_in_the_name_of_the_file(checkpoint: Checkpoint, generator: random.Random) -> None:
    """The weights lie where only a path leads, and a name is no path."""
    checkpoint.accept = "nothing"
    place = generator.choice(["inner/model", "./inner/model", "inner/../inner/model"])
    checkpoint.beside["model_file_base_name"] = place

    def move(folder: Path) -> None:
        (folder / "inner").mkdir()
        (folder / next(iter(checkpoint.shards))).rename(folder / "inner/model.safetensors")

    checkpoint.finish.append(move)
