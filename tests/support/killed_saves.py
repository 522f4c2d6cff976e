"""Saves over an older checkpoint, in processes that SIGKILL ends at random moments.

A script, so that what forks has one thread: ``killed_saves.py CHECKPOINT EMPTY_FOLDER ROUNDS SEED``. It prints, for
each round, whether the save was killed while "writing", while "renaming" or not at all, and which checkpoint then
loads: "old", "new", or else what is wrong.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from graftq.adapters.transformers.saving import save_quantized
from support.loading import load
from support.models import logits

SHARDS = "80KB"
Save = Callable[[Any, Path], None]
WAYS: list[Save] = [
    lambda model, folder: model.save_pretrained(folder),
    lambda model, folder: model.save_pretrained(folder, max_shard_size=SHARDS),
    lambda model, folder: save_quantized(model, folder, max_shard_size=SHARDS),
]


def main(checkpoint: Path, work: Path, rounds: int, seed: int) -> None:
    """Run the rounds."""
    torch.set_num_threads(1)
    old, new = load(checkpoint), load(checkpoint)
    with torch.no_grad():
        for name, parameter in new.named_parameters():
            if "norm" in name:
                parameter.mul_(1.5)
    expected = {"old": logits(old), "new": logits(new)}
    chance = random.Random(seed)
    for number in range(rounds):
        before, after = chance.choice(WAYS), chance.choice(WAYS)
        folder = work / str(number)
        before(old, folder)
        process = os.fork()
        if not process:
            after(new, folder)
            os._exit(0)
        moment = _wait_for_files(folder, chance) if number % 2 else _wait_for_time(chance)
        os.kill(process, signal.SIGKILL)
        killed = os.WIFSIGNALED(os.waitpid(process, 0)[1])
        print(moment if killed else "never", _which(folder, expected), sep=": ", flush=True)
        shutil.rmtree(folder)


def _wait_for_time(chance: random.Random) -> str:
    time.sleep(chance.uniform(0, 0.05))
    return "writing"


def _wait_for_files(folder: Path, chance: random.Random) -> str:
    """Until the new weights begin to take the place of the old, and then a moment."""
    before, deadline = _files(folder), time.monotonic() + 60
    while _files(folder) == before and time.monotonic() < deadline:
        pass
    time.sleep(chance.uniform(0, 0.0003))
    return "renaming"


def _files(folder: Path) -> set[tuple[str, int]]:
    return {(entry.name, entry.inode()) for entry in os.scandir(folder) if entry.is_file()}


def _which(folder: Path, expected: dict[str, torch.Tensor]) -> str:
    try:
        found = logits(load(folder))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return next((name for name, value in expected.items() if value.equal(found)), "a mixture")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
