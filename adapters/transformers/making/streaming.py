"""Quantizes a checkpoint from disk to disk, block by block."""

from __future__ import annotations

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path

import torch

from graftq.adapters.transformers.making.blocks import record_calls
from graftq.adapters.transformers.making.calibration import batches, fingerprint
from graftq.adapters.transformers.making.engine import BlockResult, Step, Streams, ignore, quantize_block
from graftq.adapters.transformers.making.model import (
    check_modules,
    output_embedding,
    quantize_head,
    warn_of_few,
    warn_of_skipped,
)
from graftq.adapters.transformers.making.names import Naming
from graftq.adapters.transformers.making.options import Options
from graftq.adapters.transformers.making.report import Row, as_csv
from graftq.adapters.transformers.making.source import INDEX, FloatCheckpoint, replaced_by
from graftq.adapters.transformers.making.store import Store
from graftq.plugin.checkpoint.configuration import CONFIG, QUANTIZE_CONFIG
from graftq.plugin.checkpoint.headers import CheckpointIndex, torch_dtypes

REPORT = "quantize_report.csv"
COPIED = (".json", ".txt", ".model", ".jinja", ".py", ".tiktoken")
"""Endings of the small files that go with a model."""


@torch.no_grad()
def quantize_checkpoint(
    source: Path,
    out: Path,
    rows: list[torch.Tensor],
    options: Options,
    *,
    dtype: torch.dtype,
    device: torch.device,
    resume: bool = False,
    step: Step = ignore,
) -> list[Row]:
    """Quantize the checkpoint in ``source`` into ``out``; in memory are a block, its float twin and hidden states.

    Args:
        source: A folder with a float model.
        out: A folder that is empty or not there, or one with an unfinished run.
        rows: Calibration data, from :func:`token_rows`.
        options: How.
        dtype: What the model runs in meanwhile.
        device: Where it does.
        resume: Whether to go on with the unfinished run.
        step: Told what is being done.

    Raises:
        ValueError: if the model cannot be quantized, or the unfinished run was made differently.
        OSError: if ``out`` is in use, or the disk is too small.
        CheckpointError: if ``source`` cannot be read.
    """
    given = FloatCheckpoint(source, dtype, device, options.blocks)
    head = output_embedding(given.model, options.method.group_size) if options.lm_head else ""
    if options.modules is not None:
        check_modules(given.blocks, options.modules)
    settings = {each.name: getattr(options, each.name) for each in dataclasses.fields(options) if each.init}
    identity = {
        "source": given.fingerprint(),
        "calibration data": fingerprint(rows),
        "parameters": json.loads(json.dumps(settings)),
        "device and dtype": f"{device.type} {dtype}",
    }
    store = Store(out, identity, resume)
    check_space(out, given, rows, options)
    given.load_rest()
    data = list(batches(rows, options.batch_size, device))
    recorded = [record_calls(given.model, given.blocks, batch) for batch in data]
    hidden = [first for first, _ in recorded]
    streams = Streams([], hidden, list(hidden) if options.method.drift else None)
    if store.next:
        _restore(streams, store.load_streams(), device)
    naming = Naming(given.model)
    count = len(given.blocks)
    for number in range(store.next, count):
        name = f"{given.blocks_name}.{number}"
        block = given.load_block(number)
        streams.calls = [calls[number] for _, calls in recorded]
        done = quantize_block(block, name, streams, options, step, (number, count))
        store.save_tensors(out / _shard(number, count), _shard_tensors(given, naming, given.names(name), done))
        _remember(store, naming, done)
        store.block_done(partial(_saved, streams))
        given.drop_block(number)
    if not store.extra.get("made"):
        raise ValueError(f"{source}: nothing in its blocks can be quantized")
    done = BlockResult([], [], {})
    if head:
        step(head, (count - 0.01) / count)
        done = quantize_head(given.model, given.blocks, data, head, streams, options)
        _remember(store, naming, done)
    warn_of_skipped(store.extra["skipped"])
    warn_of_few(sum(map(len, rows)), store.extra["width"])
    _finish(given, out, store, options, rows, _shard_tensors(given, naming, given.rest(), done))
    return [Row(*row) for row in store.rows]


def _shard(number: int, blocks: int) -> str:
    return f"model-{number + 1:05d}-of-{blocks + 1:05d}.safetensors"


def _shard_tensors(
    given: FloatCheckpoint, naming: Naming, names: list[str], done: BlockResult
) -> dict[str, torch.Tensor]:
    """A block, or what belongs to none, as the checkpoint stores it: packed projections, and the rest as it was."""
    gone = replaced_by({one.target: one.container for one in done.made})
    kept = []
    for each in names:
        parts = {target in gone for target in given.targets[each]}
        if parts == {True, False}:
            raise ValueError(f"{each}: the files hold packed and float layers in one tensor")
        kept += [each] if parts == {False} else []
    tensors = given.read(kept)
    for one in done.made:
        stored = naming.stored(one.target, one.container)
        for suffix, tensor in vars(one.tensors).items():
            if tensor is not None:
                full = f"{stored}.{suffix}"
                info = given.index.tensors.get(full)  # a bias keeps the dtype that it had
                tensors[full] = tensor if info is None else tensor.to(torch_dtypes()[info.dtype])
    return tensors


def _remember(store: Store, naming: Naming, done: BlockResult) -> None:
    store.rows += [list(dataclasses.astuple(row)) for row in done.rows]
    extra = store.extra
    extra["made"] = extra.get("made", 0) + len(done.made)
    extra["ordered"] = extra.get("ordered", False) or any(one.spec.desc_act for one in done.made)
    extra["width"] = max([extra.get("width", 0), *(one.spec.in_features for one in done.made)])
    extra["skipped"] = {
        **extra.get("skipped", {}),
        **{naming.plain(target): why for target, why in done.skipped.items()},
    }


def _saved(streams: Streams) -> dict[str, torch.Tensor]:
    found = {f"made.{number}": x.cpu() for number, x in enumerate(streams.made)}
    found.update({f"float.{number}": x.cpu() for number, x in enumerate(streams.float or ())})
    return found


def _restore(streams: Streams, saved: dict[str, torch.Tensor], device: torch.device) -> None:
    for number in range(len(streams.made)):
        streams.made[number] = saved[f"made.{number}"].to(device)
        if streams.float is not None:
            streams.float[number] = saved[f"float.{number}"].to(device)


def check_space(out: Path, given: FloatCheckpoint, rows: list[torch.Tensor], options: Options) -> None:
    """Make sure that the disk can hold the output and the hidden states.

    Raises:
        OSError: if it cannot, with both sizes.
    """
    blocks = sum(given.index.tensors[name].nbytes for name in given.names(given.blocks_name))
    rest = sum(given.index.tensors[name].nbytes for name in given.rest())
    width = given.model.config.get_text_config(decoder=True).hidden_size
    hidden = 4 * sum(map(len, rows)) * width * given.dtype.itemsize
    needed = int(blocks * (options.bits + 1) / 16) + rest + hidden
    free = shutil.disk_usage(out).free
    if free < needed:
        raise OSError(f"{out}: {free / 1e9:.1f} GB free, and {needed / 1e9:.1f} GB are needed")


def _finish(
    given: FloatCheckpoint,
    out: Path,
    store: Store,
    options: Options,
    rows: list[torch.Tensor],
    rest: dict[str, torch.Tensor],
) -> None:
    """Write what is no block, and the index last: before, nothing would load."""
    count = len(given.blocks)
    store.save_tensors(out / _shard(count, count), rest)
    for path in sorted(given.folder.iterdir()):
        if path.is_file() and path.suffix in COPIED and path.name not in (CONFIG, INDEX, QUANTIZE_CONFIG):
            shutil.copyfile(path, out / path.name)
    tokens = sum(map(len, rows))
    parameters = options.parameters(store.extra["ordered"], list(store.extra["skipped"]), tokens, fingerprint(rows))
    config = json.loads((given.folder / CONFIG).read_text(encoding="utf-8"))
    config["quantization_config"] = parameters
    for name, content in ((CONFIG, config), (QUANTIZE_CONFIG, parameters)):
        store.save_text(out / name, json.dumps(content, indent=2) + "\n")
    store.save_text(out / REPORT, as_csv([Row(*row) for row in store.rows]))
    written = CheckpointIndex.open([str(out / _shard(number, count)) for number in range(count + 1)]).tensors
    size = sum(info.nbytes for info in written.values())
    weight_map = {name: Path(info.file).name for name, info in written.items()}
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    store.save_text(out / INDEX, json.dumps(index, indent=2) + "\n")
    store.finish()
