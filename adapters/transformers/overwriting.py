"""Puts a new checkpoint in the place of an older one, whatever the two call their files.

A process can be killed at any moment, so the new weights are complete before anything of the old is touched, and one
step decides which of the two loads. Configurations are renamed right after the weights: in between, a checkpoint of
the same model loads as well, and one of another model has a configuration that does not go with its weights.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from graftq.plugin.checkpoint.configuration import QuantConfig, read_written
from graftq.plugin.checkpoint.json_files import read_object
from graftq.plugin.checkpoint.source import Source
from graftq.plugin.checkpoint.weight_files import SAFE_ENDINGS
from graftq.quant_linear.errors import CheckpointError

INDEX_ENDING = SAFE_ENDINGS[1]


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A folder to write a checkpoint into; if the block ends well, it takes the place of the one in ``folder``.

    It lies inside ``folder``, on the same file system, so that files are renamed and not copied. A process that is
    killed leaves it there, under a name that says what it is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="unfinished-save-", dir=folder) as name:
        yield Path(name)
        _take_over(Path(name), folder)


def _take_over(staged: Path, folder: Path) -> None:
    """Move all files from ``staged`` to ``folder``, and remove the weights there that they supersede."""
    written = {str(path.relative_to(staged)) for path in staged.rglob("*") if path.is_file()}
    present = {path.name for path in folder.iterdir() if path.is_file()}
    stems = tuple(dict.fromkeys(("model", *_stems(staged), *_stems(folder))))
    entries = [stem + ending for stem in stems for ending in SAFE_ENDINGS]  # as loading looks for them
    entry = next((name for name in entries if name in written), None)
    old_shards = present & _shards_of(folder, [name for name in entries if name in present], stems, present)

    index = read_object(staged / entry, str(staged / entry)) if entry and entry.endswith(INDEX_ENDING) else {}
    shards = set(index.get("weight_map", {}).values())
    interim = {shard: _interim(shard, entry or "", staged) for shard in shards & present}
    for shard in shards:
        (staged / shard).replace(folder / interim.get(shard, shard))
    if entry is not None:
        if interim:
            _write_index(staged / entry, index, interim)
        (staged / entry).replace(folder / entry)
    for name in sorted(written - shards - {entry}):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (staged / name).replace(folder / name)
    if entry is None:  # a variant, which is loaded on request alone
        return
    # Backwards: what would be loaded before the new goes last, and until then the old one loads.
    for name in reversed(entries):
        if name in present and name != entry:
            (folder / name).unlink(missing_ok=True)
    for name in old_shards - (shards - interim.keys()):
        (folder / name).unlink(missing_ok=True)
    if interim and _link(folder, interim):
        _write_index(staged / entry, index, {})
        (staged / entry).replace(folder / entry)
        for name in interim.values():
            (folder / name).unlink(missing_ok=True)


def _stems(folder: Path) -> tuple[str, ...]:
    """What the checkpoint in ``folder`` may call its weights; a damaged one can be saved over."""
    try:
        source = Source(str(folder))
        written = read_written(source)
        return QuantConfig.from_files(written, source).weight_names if written else ()
    except ValueError:
        return ()


def _shards_of(folder: Path, entries: list[str], stems: tuple[str, ...], present: set[str]) -> set[str]:
    """The shards that the indices among ``entries`` name, and those that an unfinished save has left."""
    pattern = rf"({'|'.join(map(re.escape, stems))})(-\w+)?-\d{{5}}-of-\d{{5}}\.safetensors"
    found = {name for name in present if re.fullmatch(pattern, name)}
    for name in entries:
        if name.endswith(INDEX_ENDING):
            weight_map = _read_old_index(folder / name).get("weight_map")
            named = weight_map.values() if isinstance(weight_map, dict) else ()
            found |= {shard for shard in named if isinstance(shard, str) and shard.endswith(SAFE_ENDINGS[0])}
    return found


def _read_old_index(path: Path) -> dict[str, Any]:
    try:
        return read_object(path, str(path))
    except CheckpointError:  # damaged, and about to be removed
        return {}


def _write_index(path: Path, index: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Write ``index`` with other ``names`` for some of its shards."""
    weight_map = {tensor: names.get(shard, shard) for tensor, shard in index["weight_map"].items()}
    write_json(path, {**index, "weight_map": weight_map})


def _interim(shard: str, entry: str, staged: Path) -> str:
    """A free name for a shard whose own is taken by one of the old checkpoint, until that is gone."""
    stem = entry.removesuffix(INDEX_ENDING)
    return f"{stem}-{staged.name.rpartition('-')[2]}{shard.removeprefix(stem)}"


def _link(folder: Path, interim: Mapping[str, str]) -> bool:
    """Give shards their own names besides the interim ones; False where the file system has no hard links."""
    try:
        for shard, name in interim.items():
            os.link(folder / name, folder / shard)
    except OSError:
        return False
    return True


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file as transformers formats its own."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
