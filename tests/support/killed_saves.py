"""Saves over an older checkpoint, in processes that SIGKILL ends at random moments.

``killed_saves.py CHECKPOINT EMPTY_FOLDER ROUNDS SEED`` prints, for each round, whether the save was killed while
"writing", while "renaming" or not at all, and which checkpoint then loads: "old", "new", or else what is wrong.
``killed_saves.py CHECKPOINT`` is the process that saves. It is not forked: loading starts threads, and a fork would
inherit their locks as they stand.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
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
    expected = {"old": logits(load(checkpoint)), "new": logits(_changed(checkpoint))}
    old = load(checkpoint)
    chance = random.Random(seed)
    saver = _start(checkpoint)
    for number in range(rounds):
        before, after = chance.choice(WAYS), chance.randrange(len(WAYS))
        folder = work / str(number)
        before(old, folder)
        process, saver = saver, _start(checkpoint)
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()  # it has loaded
        process.stdin.write(f"{after} {folder}\n")
        process.stdin.flush()
        moment = _wait_for_files(folder, process, chance) if number % 2 else _wait_for_time(chance)
        process.kill()
        killed = process.wait() == -signal.SIGKILL
        print(moment if killed else "never", _which(folder, expected), sep=": ", flush=True)
        shutil.rmtree(folder)
    saver.kill()
    saver.wait()


def save(checkpoint: Path) -> None:
    """Say that the model is there, and save it in the way and the folder that a line of the input names."""
    model = _changed(checkpoint)
    print("loaded", flush=True)
    way, folder = sys.stdin.readline().rstrip("\n").split(" ", 1)
    WAYS[int(way)](model, Path(folder))


def _start(checkpoint: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, __file__, str(checkpoint)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def _changed(checkpoint: Path) -> Any:
    model = load(checkpoint)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.mul_(1.5)
    return model


def _wait_for_time(chance: random.Random) -> str:
    time.sleep(chance.uniform(0, 0.05))
    return "writing"


def _wait_for_files(folder: Path, process: subprocess.Popen[str], chance: random.Random) -> str:
    """Until the new weights begin to take the place of the old, and then a moment."""
    before = _files(folder)
    while _files(folder) == before and process.poll() is None:
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
    torch.set_num_threads(1)
    if sys.argv[2:]:
        main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    else:
        save(Path(sys.argv[1]))
