"""``graftq inspect``: what a checkpoint holds, from its headers and its small tensors, never its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from graftq.plugin.checkpoint import unlabeled, weight_files
from graftq.plugin.checkpoint.configuration import CONFIG, QUANTIZE_CONFIG, QuantConfig, read_written
from graftq.plugin.checkpoint.headers import CheckpointIndex, TensorInfo, parse_entry
from graftq.plugin.checkpoint.json_files import read_object
from graftq.plugin.checkpoint.projections import InspectedProjection, look_at_headers, look_at_values
from graftq.plugin.checkpoint.source import Source
from graftq.plugin.checkpoint.unread import check_all_read
from graftq.quant_linear.errors import CheckpointError

VALUES_LIMIT = 4 << 30
"""Bytes of small tensors up to which they are read; a 47-billion-parameter model in groups of 128 has about 1 GiB."""


@dataclass(frozen=True)
class Inspection:
    """What was found.

    Attributes:
        source: The checkpoint.
        config: Its parameters.
        raw: The parameters by file, as written.
        weights: Name of the weight file or index.
        index: Its tensors.
        dtype: What the model's configuration names as dtype.
        seen: The quantized projections by name.
        unread: Why the small tensors' values were not read; "" if they were.
    """

    source: Source
    config: QuantConfig
    raw: Mapping[str, Mapping[str, Any]]
    weights: str
    index: CheckpointIndex
    dtype: str
    seen: Mapping[str, InspectedProjection]
    unread: str = ""
    errors: tuple[str, ...] = ()


def inspect(source: Source) -> Inspection:
    """Inspect a checkpoint.

    Raises:
        CheckpointError: if there is no GPTQ checkpoint, or its files cannot be read. What is wrong with
            single projections is among the result's errors instead.
    """
    _check_exists(source)
    raw = read_written(source)
    if not raw:
        if packed := unlabeled.find_packed(source, allows_pickles=False):
            raise unlabeled.refusal(f"there is no {QUANTIZE_CONFIG}", source.describe(CONFIG), *packed)
        raise CheckpointError(
            f"not a GPTQ checkpoint: no quantization_config in {CONFIG}, and no {QUANTIZE_CONFIG}",
            file=source.describe(""),
        )
    config = QuantConfig.from_files(raw, source)
    name = weight_files.find_safetensors(source, config)
    if name is None:
        if pickles := weight_files.find_pickles(source, config):
            raise weight_files.pickle_refused(source, pickles[0])
        raise CheckpointError("no weight file here", file=source.describe(""))
    index, unread = _open(source, name)
    model = _model(source)
    check_all_read(index, model)
    seen = {
        stored: look_at_headers(stored, infos, config.for_module(stored))
        for stored, infos in index.projections().items()
    }
    size = sum(info.nbytes for one in seen.values() for info in one.small.values())
    if not unread and size > VALUES_LIMIT:
        unread = f"they take {human(size)}"
    if not unread:
        seen = look_at_values(seen, index, config)
    errors = tuple(one.error for one in seen.values() if one.error)
    return Inspection(source, config, raw, name, index, _model_dtype(model), seen, unread, errors)


def human(size: int) -> str:
    """A number of bytes for people."""
    value, unit = float(size), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def _model(source: Source) -> dict[str, Any]:
    path = source.fetch(CONFIG)
    return read_object(path, source.describe(CONFIG)) if path else {}


def _model_dtype(model: Mapping[str, Any]) -> str:
    """What the model's configuration names as dtype, or float16."""
    text = model.get("text_config")
    holders = [model, text if isinstance(text, dict) else {}]
    named = (holder[key] for holder in holders for key in ("dtype", "torch_dtype") if holder.get(key))
    return next((dtype for dtype in named if dtype in ("float16", "bfloat16", "float32")), "float16")


def _open(source: Source, name: str) -> tuple[CheckpointIndex, str]:
    """The tensors, and why their values cannot be read (or "")."""
    weight_map = weight_files.read_weight_map(source, name) if name.endswith(".index.json") else None
    files = sorted(set(weight_map.values())) if weight_map else [name]
    here = [source.cached(file) for file in files]
    paths = [path for path in here if path is not None]
    if len(paths) == len(files):
        return CheckpointIndex.open(paths, weight_map), ""
    tensors = {info.name: info for file in files for info in _remote_header(source, file)}
    return CheckpointIndex(tensors), "the weights are on the Hub, and are not downloaded for this"


def _remote_header(source: Source, file: str) -> list[TensorInfo]:
    from huggingface_hub import HfApi

    arguments = {key: source.hub[key] for key in ("revision", "token") if key in source.hub}
    try:
        header = HfApi().parse_safetensors_file_metadata(source.name, source.full_name(file), **arguments)
        return [parse_entry(name, file, vars(entry)) for name, entry in header.tensors.items()]
    except Exception as error:  # the client's, its transport's, or a malformed header
        raise CheckpointError(
            f"cannot be read from the Hub: {_first_line(error)}", file=source.describe(file)
        ) from error


def _check_exists(source: Source) -> None:
    """Say at once what is wrong with a repository, before the client tries again and again."""
    if source.is_local or any(source.cached(name) for name in (CONFIG, QUANTIZE_CONFIG)):
        return
    try:
        from huggingface_hub import HfApi

        HfApi().model_info(source.name, revision=source.hub.get("revision"))
    except Exception as error:  # not a name, no such repository or revision, no network, no client
        reason = f"neither a folder nor a readable repository: {_first_line(error)}"
        raise CheckpointError(reason, file=source.describe("")) from error


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
