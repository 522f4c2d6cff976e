"""Packed weights of which no file says how they are packed: files of GPTQ-for-LLaMa's time, or with a file lost."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

from graftq.plugin.checkpoint import weight_files
from graftq.plugin.checkpoint.configuration import QUANTIZE_CONFIG
from graftq.plugin.checkpoint.headers import PICKLE_ENDINGS, CheckpointIndex, TensorInfo
from graftq.plugin.checkpoint.source import Source
from graftq.quant_linear.errors import CheckpointError
from graftq.quant_linear.spec import SUPPORTED_BITS

PACKED = (".qweight", ".qzeros")
"""What the names of packed tensors end in, GPTQ's and some others'."""

_SCANNED = 64 << 20


def find_packed(source: Source, allows_pickles: bool) -> tuple[str, CheckpointIndex | None] | None:
    """The name of a packed module in the folder's weights, and their tensors as far as they can be looked at.

    Args:
        source: The checkpoint. Of the Hub's, files that have no usual name are not looked at.
        allows_pickles: Whether pickles may be loaded. If not, they are searched for the names alone.

    Returns:
        None if nothing is packed, or if nothing says which of several files counts.
    """
    usual = (f"model{ending}" for ending in weight_files.SAFE_ENDINGS)
    names = source.names() if source.is_local else [name for name in usual if source.has(name)]
    names = [name for name in names if not name.startswith(weight_files.NOT_WEIGHTS)]
    safe = [name for name in names if name.endswith(weight_files.SAFE_ENDINGS)]
    try:
        chosen = next((name for name in safe if name.startswith("model.")), None) or weight_files.the_only(source, safe)
        if chosen is None and not safe:
            pickles = [name for name in names if name.endswith(PICKLE_ENDINGS)]
            chosen = pickles[0] if len(pickles) == 1 else None
        path = source.fetch(chosen) if chosen else None
        if chosen is None or path is None:
            return None
        if chosen.endswith(PICKLE_ENDINGS) and not allows_pickles:
            return (chosen, None) if mentions_packed(path) else None
        if chosen.endswith(".index.json"):
            weight_map = weight_files.read_weight_map(source, chosen)
            shards = sorted(set(weight_map.values())) if packed_name(list(weight_map)) else []
            paths = [source.fetch(shard) for shard in shards]
            index = CheckpointIndex.open([path for path in paths if path is not None])
        else:
            index = CheckpointIndex.open([path])
    except CheckpointError:  # not for us to say: the host's own reader will
        return None
    module = packed_name(list(index.tensors))
    return None if module is None else (module, index)


def packed_name(names: Sequence[str]) -> str | None:
    """The first of the names that is a packed tensor's."""
    return next((name for name in names if name.endswith(PACKED)), None)


def mentions_packed(path: str) -> bool:
    """Whether a pickle has names of packed tensors; it is searched as text, and nothing in it runs."""
    names = [ending.encode() for ending in PACKED]
    try:
        if not zipfile.is_zipfile(path):
            with open(path, "rb") as stream:
                start = stream.read(_SCANNED)
        else:
            with zipfile.ZipFile(path) as archive:
                entry = next((name for name in archive.namelist() if name.endswith("data.pkl")), None)
                if entry is None:
                    return False
                with archive.open(entry) as stream:
                    start = stream.read(_SCANNED)
    except (OSError, zipfile.BadZipFile):
        return False
    return any(name in start for name in names)


def refusal(why: str, file: str, module: str | None, index: CheckpointIndex | None) -> CheckpointError:
    """What to tell the user: what is missing, and what to write.

    Args:
        why: Why nothing says how the weights are packed.
        file: Where it should.
        module: A packed module.
        index: The tensors, if they can be looked at.
    """
    shown = parameters_shown_by(index.packed()) if index is not None else {}
    if shown:
        arguments = ", ".join(f"{key}={value}" for key, value in shown.items())
        advice = f"their shapes fit {json.dumps(shown)}: write that to {QUANTIZE_CONFIG} beside them, or pass "
        advice += f"quantization_config=GPTQConfig({arguments})"
    else:
        advice = f'write {{"bits": ..., "group_size": ...}} to {QUANTIZE_CONFIG} beside them, or pass '
        advice += "quantization_config=GPTQConfig(bits=..., group_size=...)"
    reason = f"packed weights, but {why}, so nothing says how to unpack them; {advice}"
    return CheckpointError(reason, file=file, module=module)


def parameters_shown_by(projections: Mapping[str, Mapping[str, TensorInfo]]) -> dict[str, Any]:
    """``bits`` and ``group_size`` where the shapes of all projections agree in them; {} where they do not."""
    bits: set[int] = set()
    groups: set[int] = set()
    for infos in projections.values():
        shapes = [infos[suffix].shape for suffix in ("qweight", "qzeros", "scales") if suffix in infos]
        if len(shapes) != 3 or any(len(shape) != 2 or 0 in shape for shape in shapes):
            return {}
        (rows, columns), (_, zeros), (number, _) = shapes
        width = zeros * 32 // columns
        if zeros * 32 % columns or width not in SUPPORTED_BITS:
            return {}
        order = infos.get("g_idx")
        inputs = order.shape[0] if order is not None and len(order.shape) == 1 else rows * 32 // width
        bits.add(width)
        groups.add(-1 if number == 1 else -(-inputs // number))
    several = groups - {-1} or groups  # a layer of one group says nothing if others have more
    if len(bits) != 1 or len(several) != 1:
        return {}
    return {"bits": bits.pop(), "group_size": several.pop()}
