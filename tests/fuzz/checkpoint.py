"""A checkpoint in memory, which mutations change before it is written to a folder."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

NUMPY_TYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,
    "F8_E4M3": np.uint8,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
"""By safetensors' names; numpy has no bfloat16 and no 8-bit float, so these are seen as their bits."""

INDEX = "model.safetensors.index.json"
INSIDE = "config.json"
BESIDE = "quantize_config.json"


@dataclass
class Stored:
    """A tensor as a file has it."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def of(cls, array: np.ndarray, dtype: str = "") -> Stored:
        own = next(name for name, kind in NUMPY_TYPES.items() if kind == array.dtype)
        return cls(dtype or own, array.shape, np.ascontiguousarray(array).tobytes())

    def array(self) -> np.ndarray:
        """A copy that can be changed."""
        return np.frombuffer(self.data, dtype=NUMPY_TYPES[self.dtype]).reshape(self.shape).copy()

    def floats(self) -> np.ndarray:
        """Its values in float32."""
        if self.dtype == "BF16":
            return (self.array().astype(np.uint32) << 16).view(np.float32)
        return self.array().astype(np.float32)


@dataclass
class Checkpoint:
    """What the files are to say, and what may come of loading them.

    Attributes:
        config: The model's fields of ``config.json``.
        inside: Its ``quantization_config``; None leaves it out.
        beside: ``quantize_config.json``; None leaves it out.
        shards: Weight files, by name.
        index: Content of the index of shards, if there is one.
        rewrite: Changes to the bytes of a file, by its name; made to the float twin's ``config.json``, too.
        finish: Changes to the folder once it is written.
        arguments: For ``from_pretrained``.
        bits: What the tensors have.
        group_size: The same.
        zero_offset: What is added to a stored zero point.
        shapes: [N, K] of each packed module without padding.
        plain: Names of the other tensors that the undamaged files have.
        accept: What a load may give: "reading", what the files mean; "base", what the undamaged checkpoint gives;
            "nothing", no load is right.
        must_load: Whether the change is harmless, so that a refusal is wrong.
    """

    config: dict[str, Any]
    inside: Any
    beside: Any
    shards: dict[str, dict[str, Stored]]
    index: Any
    bits: int
    group_size: int
    zero_offset: int
    shapes: dict[str, tuple[int, int]]
    plain: frozenset[str]
    rewrite: dict[str, Callable[[bytes], bytes]] = field(default_factory=dict)
    finish: list[Callable[[Path], None]] = field(default_factory=list)
    arguments: dict[str, Any] = field(default_factory=dict)
    accept: str = "reading"
    must_load: bool = False

    def parameters(self) -> list[dict[str, Any]]:
        """The quantization parameters, wherever they are stated."""
        return [stated for stated in (self.inside, self.beside) if isinstance(stated, dict)]

    def shard_with(self, name: str) -> dict[str, Stored]:
        """The content of the file that holds this tensor."""
        return next(content for content in self.shards.values() if name in content)

    def packed(self) -> list[str]:
        """Names of the packed modules."""
        return sorted(self.shapes)

    def change(self, name: str, change: Callable[[np.ndarray], np.ndarray | None]) -> None:
        """Replace a tensor by what ``change`` returns, or by what it has made of the array in place."""
        content = self.shard_with(name)
        array = content[name].array()
        changed = change(array)
        dtype = content[name].dtype if changed is None or changed.dtype == array.dtype else ""
        content[name] = Stored.of(array if changed is None else changed, dtype)

    def put(self, name: str, tensor: Stored) -> None:
        """Add a tensor to the first file, and to the index."""
        file = next(iter(self.shards))
        self.shards[file][name] = tensor
        if self.index is not None:
            self.index["weight_map"][name] = file

    def drop(self, name: str) -> None:
        """Remove a tensor from its file and from the index."""
        del self.shard_with(name)[name]
        if self.index is not None:
            del self.index["weight_map"][name]

    def write(self, folder: Path) -> None:
        """Write all files."""
        inside = {} if self.inside is None else {"quantization_config": self.inside}
        texts = {INSIDE: {**self.config, **inside}, BESIDE: self.beside, INDEX: self.index}
        contents = {name: json.dumps(value).encode() for name, value in texts.items() if value is not None}
        contents |= {name: serialize(tensors) for name, tensors in self.shards.items()}
        for name, content in contents.items():
            (folder / name).write_bytes(self.rewrite.get(name, bytes)(content))
        for finish in self.finish:
            finish(folder)


def serialize(tensors: dict[str, Stored]) -> bytes:
    """A safetensors file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, tensor in tensors.items():
        end = position + len(tensor.data)
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    return join(json.dumps(header).encode(), b"".join(tensor.data for tensor in tensors.values()))


def join(header: bytes, data: bytes) -> bytes:
    """A safetensors file of a header as it is, without padding."""
    return struct.pack("<Q", len(header)) + header + data


def split(content: bytes) -> tuple[bytes, bytes]:
    """Header and data of an undamaged safetensors file."""
    (length,) = struct.unpack("<Q", content[:8])
    return content[8 : 8 + length], content[8 + length :]
