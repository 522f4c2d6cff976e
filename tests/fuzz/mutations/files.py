"""The folder: what is a file, what is a folder, what is absent, empty, or a link into nowhere."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

from fuzz.checkpoint import BESIDE, INDEX, INSIDE, Checkpoint, serialize
from fuzz.registry import mutation


def _files(checkpoint: Checkpoint) -> list[str]:
    beside = [BESIDE] if checkpoint.beside is not None else []
    return [INSIDE, *beside, *([INDEX] if checkpoint.index is not None else []), *sorted(checkpoint.shards)]


def _replace(checkpoint: Checkpoint, generator: random.Random, make) -> None:
    checkpoint.accept = "base"
    name = generator.choice(_files(checkpoint))

    def finish(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    checkpoint.finish.append(finish)


@mutation("files")
def folder_instead(checkpoint: Checkpoint, generator: random.Random) -> None:
    _replace(checkpoint, generator, Path.mkdir)


@mutation("files")
def empty(checkpoint: Checkpoint, generator: random.Random) -> None:
    _replace(checkpoint, generator, Path.touch)


@mutation("files")
def absent(checkpoint: Checkpoint, generator: random.Random) -> None:
    _replace(checkpoint, generator, lambda path: None)


@mutation("files")
def link_into_nowhere(checkpoint: Checkpoint, generator: random.Random) -> None:
    _replace(checkpoint, generator, lambda path: path.symlink_to("nowhere"))


@mutation("files")
def link_to_itself(checkpoint: Checkpoint, generator: random.Random) -> None:
    _replace(checkpoint, generator, lambda path: path.symlink_to(path.name))


@mutation("files")
def pipe(checkpoint: Checkpoint, generator: random.Random) -> None:
    """A pipe that nothing writes to; transformers itself waits where it opens ``config.json``."""
    checkpoint.accept = "base"
    name = generator.choice([name for name in _files(checkpoint) if name != INSIDE])

    def finish(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    checkpoint.finish.append(finish)


@mutation("files")
def folder_of_another_name(checkpoint: Checkpoint, generator: random.Random) -> None:
    """Beside the files, and of no concern."""
    checkpoint.must_load = True
    name = generator.choice(["model.safetensors.d", "x.safetensors", "pytorch_model.bin", "adapter_model.safetensors"])
    checkpoint.finish.append(lambda folder: (folder / name).mkdir())


@mutation("files")
def all_links(checkpoint: Checkpoint, generator: random.Random) -> None:
    """As in the Hub's cache."""
    checkpoint.must_load = True

    def finish(folder: Path) -> None:
        (folder / "blobs").mkdir()
        for name in _files(checkpoint):
            shutil.move(folder / name, folder / "blobs" / name)
            (folder / name).symlink_to(Path("blobs", name))

    checkpoint.finish.append(finish)


@mutation("files", layout="AutoGPTQ's")
def a_second_weight_file(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "base"
    content = b"" if generator.random() < 0.5 else serialize({})
    name = generator.choice(["other", "adapter_model", "consolidated.00", "gptq_model-8bit-128g", "optimizer"])
    checkpoint.finish.append(lambda folder: (folder / f"{name}.safetensors").write_bytes(content))


@mutation("files", layout="sharded")
def an_older_single_file(checkpoint: Checkpoint, generator: random.Random) -> None:
    """An empty one beside the index of shards."""
    checkpoint.accept = "base"
    checkpoint.finish.append(lambda folder: (folder / "model.safetensors").write_bytes(serialize({})))


@mutation("files")
def not_readable(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "base"
    name = generator.choice(_files(checkpoint))
    checkpoint.finish.append(lambda folder: (folder / name).chmod(0))


@mutation("files")
def sparse_gigabytes(checkpoint: Checkpoint, generator: random.Random) -> None:
    """A JSON file, or an unknown one, of three gigabytes that take no place on the disk."""
    checkpoint.accept = "base"
    name = generator.choice([name for name in _files(checkpoint) if name.endswith(".json") and name != INSIDE] or ["x"])
    checkpoint.finish.append(lambda folder: os.truncate(_touched(folder / name), 3 * 2**30))


def _touched(path: Path) -> Path:
    path.touch()
    return path
