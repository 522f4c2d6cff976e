"""What an unfinished run leaves behind, such that it can be killed at any moment and go on."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from graftq.adapters.transformers.making.source import INDEX

FOLDER = ".graftq"
STATE = "state.json"
FORMAT = 1
WORTH = 10
"""Hidden states are written once the work since the last time took so many times what writing them took.

That is a tenth of a run's time at most, and as much work as ten times writing at most is done again after a kill. With
262,144 tokens of a Llama-3-8B, writing takes longer than quantizing a block.
"""


class Store:
    """An output folder. Every file is written aside, put on the disk, and renamed.

    Args:
        out: The folder.
        identity: Everything that must be the same for a run to go on.
        resume: Whether it may.

    Raises:
        FileExistsError: if the folder holds something and this is not to resume, or nothing that could be resumed.
        ValueError: if what is there was made differently, naming the difference.
    """

    def __init__(self, out: Path, identity: Mapping[str, Any], resume: bool):
        self.out, self.work = out, out / FOLDER
        self.next = self._done = 0
        self._cost, self._saved_at = 0.0, time.monotonic()
        self.rows: list[list[Any]] = []
        self.extra: dict[str, Any] = {}
        state = self.work / STATE
        if state.is_file():
            if not resume:
                raise FileExistsError(f"{out}: an unfinished run is there; --resume goes on with it")
            found = json.loads(state.read_text(encoding="utf-8"))
            for key, value in {"format": FORMAT, **identity}.items():
                if found["identity"].get(key) != value:
                    raise ValueError(f"{out}: the unfinished run there differs in {key}")
            self.next, self.rows, self.extra = found["next"], found["rows"], found["extra"]
            self._done = self.next
        elif resume and (out / INDEX).is_file() and self.work.is_dir():
            shutil.rmtree(self.work)  # it was stopped at the very last step
            raise FileExistsError(f"{out}: this run is complete")
        elif out.is_dir() and any(entry.name != FOLDER for entry in out.iterdir()):
            raise FileExistsError(
                f"{out}: the folder is not empty" + (", and holds no unfinished run" if resume else "")
            )
        self.identity = {"format": FORMAT, **identity}
        self.work.mkdir(parents=True, exist_ok=True)
        if not state.is_file():
            self._save_state()

    def save_tensors(self, path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write a safetensors file."""
        aside = self.work / f"unfinished-{path.name}"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside, metadata={"format": "pt"})
        _settle(aside, path)

    def save_text(self, path: Path, text: str) -> None:
        """Write a text file."""
        aside = self.work / f"unfinished-{path.name}"
        aside.write_text(text, encoding="utf-8")
        _settle(aside, path)

    def load_streams(self) -> dict[str, torch.Tensor]:
        """The hidden states before the next block."""
        return load_file(self.work / f"streams-{self.next}.safetensors")

    def block_done(self, streams: Callable[[], Mapping[str, torch.Tensor]]) -> None:
        """Take note that another block's shard is written; where it is worth it, remember that on the disk.

        A run that goes on begins behind the last block that was remembered, and writes the same shards again.

        Args:
            streams: Makes the hidden states behind the block.
        """
        self._done += 1
        began = time.monotonic()
        if began - self._saved_at < WORTH * self._cost:
            return
        self.save_tensors(self.work / f"streams-{self._done}.safetensors", streams())
        before, self.next = self.next, self._done
        self._save_state()
        (self.work / f"streams-{before}.safetensors").unlink(missing_ok=True)
        self._saved_at = time.monotonic()
        self._cost = self._saved_at - began

    def _save_state(self) -> None:
        state = {"identity": self.identity, "next": self.next, "rows": self.rows, "extra": self.extra}
        self.save_text(self.work / STATE, json.dumps(state))

    def finish(self) -> None:
        """Remove what only matters to an unfinished run."""
        for path in self.work.iterdir():
            if path.name != STATE:
                path.unlink()
        shutil.rmtree(self.work)


def _settle(aside: Path, path: Path) -> None:
    with aside.open("rb+") as handle:
        os.fsync(handle.fileno())
    aside.replace(path)
    if hasattr(os, "O_DIRECTORY"):
        folder = os.open(path.parent, os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
