"""What a checkpoint's files hold, read from their headers alone.

The headers are parsed here, strictly, so that a refusal can name the tensor; values are read on demand.
Source of the header format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import math
import re
import struct
import zipfile
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftq.plugin.checkpoint.fields import brief
from graftq.plugin.checkpoint.json_files import SIZE_LIMIT, parse_object
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
        offset: Where in the file it begins, in bytes; 0 where that is not known.
    """

    name: str
    file: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    offset: int = 0


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
                ``weight_map`` promises, or if two files hold different tensors of one name.
        """
        tensors: dict[str, TensorInfo] = {}
        for file in files:
            for info in _read_header(file):
                twin = tensors.setdefault(info.name, info)
                if twin is not info and not _are_equal(twin, info):
                    reason = f"{twin.file} has another tensor of this name"
                    raise CheckpointError(reason, file=info.file, module=info.name)
        for name, shard in (weight_map or {}).items():
            if name not in tensors:
                raise CheckpointError("the index promises this tensor, the file lacks it", file=shard, module=name)
        return cls(tensors)

    def projections(self) -> dict[str, dict[str, TensorInfo]]:
        """Quantized projections: module name to the tensors it has, keyed by suffix.

        A projection is quantized if the files say so, that is, if any GPTQ tensor bears its name.

        Raises:
            CheckpointError: if a projection is there twice, packed and as a plain weight, has no name, or is in the
                layout of a kernel of graftq's, which has ``codes`` for ``qweight``.
        """
        packed = self.packed()
        for module, parts in packed.items():
            if not module:
                info = next(iter(parts.values()))
                raise CheckpointError("a packed tensor of no module", file=info.file, module=info.name)
            if f"{module}.weight" in self.tensors:
                reason = "both packed and as a plain weight, and nothing says which one counts"
                raise CheckpointError(reason, file=next(iter(parts.values())).file, module=module)
            if "qweight" not in parts and f"{module}.codes" in self.tensors:
                reason = "in a kernel's layout, as state_dict() has it; save_pretrained() writes the checkpoint"
                raise CheckpointError(reason, file=next(iter(parts.values())).file, module=module)
        return packed

    def packed(self) -> dict[str, dict[str, TensorInfo]]:
        """As :meth:`projections`, of files that may be of another format."""
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
        self, projections: Mapping[str, Mapping[str, TensorInfo]], whole: Collection[str] = ()
    ) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """Yield each projection's tensors by suffix, as soon as the files have given them.

        Args:
            projections: Their tensors.
            whole: Keys of those whose ``qweight`` is wanted, too; it is mapped into memory, not read.
        """
        owner = {
            info.name: (key, suffix)
            for key, infos in projections.items()
            for suffix, info in infos.items()
            if suffix != "qweight" or key in whole
        }
        wanted: dict[str, int] = defaultdict(int)
        for key, _ in owner.values():
            wanted[key] += 1
        pending: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
        for name, tensor in self.read(owner):
            key, suffix = owner[name]
            pending[key][suffix] = tensor
            if len(pending[key]) == wanted[key]:
                yield key, pending.pop(key)

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield ``(name, tensor)``, file by file; a tensor is backed by the file until the next one is asked for.

        Raises:
            CheckpointError: if a file or a tensor cannot be read.
        """
        by_file: dict[str, list[str]] = defaultdict(list)
        for name in names:
            by_file[self.tensors[name].file].append(name)
        for file, wanted in by_file.items():
            with ExitStack() as stack:
                if file.endswith(PICKLE_ENDINGS):
                    state = _load_pickle(file)
                    yield from ((name, state[name]) for name in wanted)
                else:
                    handle = stack.enter_context(_open_safely(file))
                    for name in wanted:
                        yield name, _get_tensor(handle, file, name)


def _read_header(file: str) -> Iterator[TensorInfo]:
    if not Path(file).is_file():
        raise CheckpointError("the file is absent", file=file)
    if file.endswith(PICKLE_ENDINGS):
        yield from _read_pickle_header(file)
        return
    try:
        size = Path(file).stat().st_size
        with open(file, "rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            encoded = stream.read(min(length, SIZE_LIMIT + 1))
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", file=file) from error
    if not 2 <= length <= size - 8:
        raise CheckpointError(f"truncated or not a safetensors file ({size} bytes)", file=file)
    try:
        infos = _parse_header(encoded, file)
    except CheckpointError as error:
        raise CheckpointError(f"malformed safetensors header: {error.reason}", file=file) from error
    end = sum(info.nbytes for info in infos)
    if size != 8 + length + end:
        raise CheckpointError(f"truncated: the header promises {8 + length + end} bytes, there are {size}", file=file)
    with _open_safely(file):  # the library that will read the tensors must accept the file, too
        yield from (replace(info, offset=8 + length + info.offset) for info in infos)


def _parse_header(encoded: bytes, file: str) -> list[TensorInfo]:
    """The tensors, with offsets that count from the end of the header."""
    header = parse_object(encoded, file, is_strict=True)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError("__metadata__ is not an object of strings", file=file)
    infos = [parse_entry(name, file, entry) for name, entry in header.items()]
    position = 0
    for offset, nbytes in sorted((info.offset, info.nbytes) for info in infos):
        if offset != position:
            raise CheckpointError("tensors overlap, or leave gaps", file=file)
        position += nbytes
    return infos


def parse_entry(name: str, file: str, entry: Any) -> TensorInfo:
    """One tensor's entry of a safetensors header.

    Raises:
        CheckpointError: if it is malformed.
    """
    fields: Mapping[str, Any] = entry if isinstance(entry, Mapping) else {}
    span: Any = fields.get("data_offsets")
    shape: Any = fields.get("shape")
    dtype = fields.get("dtype")
    if not (_are_sizes(span) and len(span) == 2 and _are_sizes(shape) and isinstance(dtype, str)):
        reason = "no entry of a dtype, a shape and two offsets, all whole numbers"
        raise CheckpointError(f"{name} has {reason}", file=file)
    nbytes = span[1] - span[0]
    bits = re.search("[0-9]+", dtype)  # "F8_E4M3" and its like begin with the width, too
    if nbytes < 0 or (bits and math.prod(shape) * int(bits[0][:4]) != nbytes * 8):
        raise CheckpointError(f"{name} has shape {list(shape)} of {dtype} in {nbytes} bytes", file=file)
    return TensorInfo(name, file, tuple(shape), dtype, nbytes, span[0])


def _are_sizes(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(type(size) is int and 0 <= size < 1 << 63 for size in value)


def _open_safely(file: str) -> Any:
    """``safetensors.safe_open``, with errors that name the file."""
    from safetensors import safe_open

    try:
        return safe_open(file, framework="pt")
    except Exception as error:  # the library's own, or the system's
        raise CheckpointError(f"cannot be read by safetensors: {error}", file=file) from error


def _get_tensor(handle: Any, file: str, name: str) -> torch.Tensor:
    try:
        return handle.get_tensor(name)
    except Exception as error:  # the library's own, or torch's for a dtype that it does not have
        raise CheckpointError(f"cannot be read by safetensors: {error}", file=file, module=name) from error


def _are_equal(one: TensorInfo, other: TensorInfo) -> bool:
    """Whether two tensors of one name have the same content; compared as bytes, piece by piece."""
    if (one.shape, one.dtype) != (other.shape, other.dtype) or not (one.offset and other.offset):
        return False  # of a pickle no offset is known
    with open(one.file, "rb") as first_stream, open(other.file, "rb") as second_stream:
        first_stream.seek(one.offset)
        second_stream.seek(other.offset)
        left = one.nbytes
        while left:
            size = min(left, 1 << 20)
            if first_stream.read(size) != second_stream.read(size):
                return False
            left -= size
    return True


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


def info_of(name: str, tensor: torch.Tensor, file: str = "") -> TensorInfo:
    """What the header of ``file`` would say of a tensor in memory."""
    names = {dtype: own for own, dtype in torch_dtypes().items()}
    return TensorInfo(name, file, tuple(tensor.shape), names.get(tensor.dtype, str(tensor.dtype)), tensor.nbytes)


def _read_pickle_header(file: str) -> Iterator[TensorInfo]:
    return (info_of(name, tensor, file) for name, tensor in _load_pickle(file).items())


def _kind(value: object) -> str:
    layout = str(getattr(value, "layout", "torch.strided")).removeprefix("torch.")
    return type(value).__name__ if layout == "strided" else f"{layout} {type(value).__name__}"


def _load_pickle(file: str) -> dict[str, torch.Tensor]:
    import torch

    try:
        # Pickles of torch before 1.6 are no archives, and cannot be mapped into memory.
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # torch raises half a dozen types here, all meaning the same to the user
        raise CheckpointError(f"not a readable torch state dict: {error}", file=file) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"holds a {type(state).__name__}, not a flat dict of tensors", file=file)
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            reason = f"holds a {_kind(value)} under {brief(name)}, not a flat dict of tensors"
            raise CheckpointError(reason, file=file)
    return state
