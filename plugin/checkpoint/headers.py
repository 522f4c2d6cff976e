"""What a checkpoint's files hold, read from their headers alone.

Standard library only, so that ``graftq inspect`` starts without torch; values are read on demand.
Source of the header format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftq.quant_linear.errors import CheckpointError

if TYPE_CHECKING:
    import torch

SUFFIXES = ("qweight", "qzeros", "scales", "g_idx", "bias")
"""Tensors of one quantized projection, in the order of :class:`~graftq.quant_linear.layouts.GptqTensors`."""

PICKLE_ENDINGS = (".bin", ".pt", ".pth")


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is and what it looks like.

    Attributes:
        name: Its name in the file.
        file: The file.
        shape: Its shape.
        dtype: Its dtype as safetensors writes it ("I32", "F16", "BF16", "F32", ...).
        nbytes: Its size in bytes.
    """

    name: str
    file: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int


@dataclass(frozen=True)
class CheckpointIndex:
    """The tensors of a checkpoint, by name, over all of its files."""

    tensors: Mapping[str, TensorInfo]

    @classmethod
    def open(cls, files: Sequence[str], weight_map: Mapping[str, str] | None = None) -> CheckpointIndex:
        """Read the headers of ``files``.

        Args:
            files: Safetensors files, or pickles that the caller has allowed.
            weight_map: Tensor name to file name, from a sharded checkpoint's index.

        Raises:
            CheckpointError: if a file is absent, truncated or malformed, or lacks a tensor that
                ``weight_map`` promises.
        """
        tensors: dict[str, TensorInfo] = {}
        for file in files:
            tensors.update((info.name, info) for info in _read_header(file))
        for name, shard in (weight_map or {}).items():
            if name not in tensors:
                raise CheckpointError("the index promises this tensor, the file lacks it", file=shard, module=name)
        return cls(tensors)

    def projections(self) -> dict[str, dict[str, TensorInfo]]:
        """Quantized projections: module name to the tensors it has, keyed by suffix.

        A projection is quantized if the files say so, that is, if any GPTQ tensor bears its name.
        """
        found: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
        for name, info in self.tensors.items():
            module, _, suffix = name.rpartition(".")
            if suffix in SUFFIXES:
                found[module][suffix] = info
        return {
            module: {suffix: parts[suffix] for suffix in SUFFIXES if suffix in parts}
            for module, parts in found.items()
            if parts.keys() & {"qweight", "qzeros"}
        }

    def read_small(
        self, projections: Mapping[str, Mapping[str, TensorInfo]]
    ) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """Yield each projection's tensors by suffix, all but ``qweight``, as soon as the files have given them."""
        owner = {
            info.name: (key, suffix)
            for key, infos in projections.items()
            for suffix, info in infos.items()
            if suffix != "qweight"
        }
        pending: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
        for name, tensor in self.read(owner):
            key, suffix = owner[name]
            pending[key][suffix] = tensor
            if len(pending[key]) == len(projections[key].keys() - {"qweight"}):
                yield key, pending.pop(key)

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield ``(name, tensor)``, file by file; a tensor is backed by the file until the next one is asked for."""
        by_file: dict[str, list[str]] = defaultdict(list)
        for name in names:
            by_file[self.tensors[name].file].append(name)
        for file, wanted in by_file.items():
            with ExitStack() as stack:
                if file.endswith(PICKLE_ENDINGS):
                    state = _load_pickle(file)
                    yield from ((name, state[name]) for name in wanted)
                else:
                    from safetensors import safe_open

                    handle = stack.enter_context(safe_open(file, framework="pt"))
                    yield from ((name, handle.get_tensor(name)) for name in wanted)


def _read_header(file: str) -> Iterator[TensorInfo]:
    if not Path(file).is_file():
        raise CheckpointError("the file is absent", file=file)
    if file.endswith(PICKLE_ENDINGS):
        yield from _read_pickle_header(file)
        return
    size = Path(file).stat().st_size
    with open(file, "rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= size - 8:
            raise CheckpointError(f"truncated or not a safetensors file ({size} bytes)", file=file)
        try:
            header = json.loads(stream.read(length))
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            infos = [parse_entry(name, file, entry) for name, entry in entries.items()]
            end = sum(info.nbytes for info in infos)
            if sorted(tuple(entry["data_offsets"]) for entry in entries.values()) != _back_to_back(entries):
                raise ValueError("tensors overlap, or leave gaps")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"malformed safetensors header: {error}", file=file) from error
    if size != 8 + length + end:
        raise CheckpointError(f"truncated: the header promises {8 + length + end} bytes, there are {size}", file=file)
    yield from infos


def parse_entry(name: str, file: str, entry: Mapping[str, Any]) -> TensorInfo:
    """One tensor's entry of a safetensors header; ``ValueError``, ``KeyError`` or ``TypeError`` if it is malformed."""
    begin, end = (int(offset) for offset in entry["data_offsets"])
    shape, dtype = tuple(int(size) for size in entry["shape"]), str(entry["dtype"])
    bits = re.search(r"\d+", dtype)  # "F8_E4M3" and its like begin with the width, too
    if min(begin, *shape, 0) < 0 or (bits and math.prod(shape) * int(bits[0]) != (end - begin) * 8):
        raise ValueError(f"{name} has shape {list(shape)} of {dtype} in {end - begin} bytes")
    return TensorInfo(name, file, shape, dtype, end - begin)


def _back_to_back(entries: Mapping[str, Mapping[str, Any]]) -> list[tuple[int, int]]:
    """Where the tensors would lie without gaps, in the order of their beginnings."""
    spans, position = [], 0
    for begin, end in sorted(tuple(entry["data_offsets"]) for entry in entries.values()):
        spans.append((position, position + end - begin))
        position += end - begin
    return spans


def torch_dtypes() -> dict[str, torch.dtype]:
    """torch's dtypes by the names that :class:`TensorInfo` gives to those of packed tensors."""
    import torch

    return {
        "I32": torch.int32,
        "I64": torch.int64,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F32": torch.float32,
    }


def _read_pickle_header(file: str) -> Iterator[TensorInfo]:
    names = {dtype: name for name, dtype in torch_dtypes().items()}
    for name, tensor in _load_pickle(file).items():
        yield TensorInfo(name, file, tuple(tensor.shape), names.get(tensor.dtype, str(tensor.dtype)), tensor.nbytes)


def _load_pickle(file: str) -> dict[str, torch.Tensor]:
    import torch

    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises half a dozen types here, all meaning the same to the user
        raise CheckpointError(f"not a readable torch state dict: {error}", file=file) from error
