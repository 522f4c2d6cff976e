"""Headers of safetensors files, written by hand; what they mean is what the strict reader of ``truth`` says."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from typing import Any

from fuzz.checkpoint import Checkpoint, join, split
from fuzz.registry import Function, mutation
from fuzz.values import HOSTILE, hostile

Header = dict[str, Any]


def _victim(checkpoint: Checkpoint, generator: random.Random) -> str:
    return generator.choice(sorted(checkpoint.shards))


def header(change: Callable[[Header, random.Random], Any]) -> Function:
    """Enter a change to the parsed header of one file: made in place, or returned."""

    def function(checkpoint: Checkpoint, generator: random.Random) -> None:
        def rewrite(content: bytes) -> bytes:
            text, data = split(content)
            whole = json.loads(text)
            changed = change(whole, generator)
            return join(json.dumps(whole if changed is None else changed).encode(), data)

        checkpoint.rewrite[_victim(checkpoint, generator)] = rewrite

    function.__name__ = change.__name__
    return mutation("headers")(function)


def content(change: Callable[[bytes, bytes, random.Random], bytes]) -> Function:
    """Enter a change to header and data as bytes."""

    def function(checkpoint: Checkpoint, generator: random.Random) -> None:
        checkpoint.rewrite[_victim(checkpoint, generator)] = lambda whole: change(*split(whole), generator)

    function.__name__ = change.__name__
    return mutation("header bytes")(function)


def _name(whole: Header, generator: random.Random) -> str:
    return generator.choice(sorted(whole.keys() - {"__metadata__"}))


@header
def hostile_entry(whole: Header, generator: random.Random) -> None:
    whole[_name(whole, generator)] = hostile(generator)


@header
def part_missing(whole: Header, generator: random.Random) -> None:
    del whole[_name(whole, generator)][generator.choice(["dtype", "shape", "data_offsets"])]


@header
def hostile_dtype(whole: Header, generator: random.Random) -> None:
    names = ["F8_E4M3", "F8_E5M2", "I4", "F4", "i32", "I33", "C64", "BOOL", "U32", "F64"]
    whole[_name(whole, generator)]["dtype"] = generator.choice([*names, *HOSTILE])


@header
def dtype_of_the_same_width(whole: Header, generator: random.Random) -> None:
    entry = whole[_name(whole, generator)]
    same = {"I32": ["F32", "U32"], "F32": ["I32", "U32"], "F16": ["BF16", "I16", "U16"], "BF16": ["F16", "I16"]}
    entry["dtype"] = generator.choice(same[entry["dtype"]])


@header
def hostile_shape(whole: Header, generator: random.Random) -> None:
    whole[_name(whole, generator)]["shape"] = hostile(generator)


@header
def hostile_size(whole: Header, generator: random.Random) -> None:
    shape = whole[_name(whole, generator)]["shape"]
    shape[generator.randrange(len(shape))] = hostile(generator)


@header
def other_rank(whole: Header, generator: random.Random) -> None:
    entry = whole[_name(whole, generator)]
    shape = entry["shape"]
    entry["shape"] = generator.choice([shape[::-1], [*shape, 1], [1, *shape], [2**32, 2**32, 0], []])


@header
def sizes_as_floats(whole: Header, generator: random.Random) -> None:
    entry = whole[_name(whole, generator)]
    key = generator.choice(["shape", "data_offsets"])
    entry[key] = [generator.choice([float, str])(number) for number in entry[key]]


@header
def hostile_offsets(whole: Header, generator: random.Random) -> None:
    whole[_name(whole, generator)]["data_offsets"] = hostile(generator)


@header
def hostile_offset(whole: Header, generator: random.Random) -> None:
    whole[_name(whole, generator)]["data_offsets"][generator.randrange(2)] = hostile(generator)


@header
def shifted_offsets(whole: Header, generator: random.Random) -> None:
    offsets = whole[_name(whole, generator)]["data_offsets"]
    step = generator.choice([-4, -1, 1, 4, 2**40])
    whole[_name(whole, generator)]["data_offsets"] = [offset + step for offset in offsets]


@header
def offsets_reversed(whole: Header, generator: random.Random) -> None:
    whole[_name(whole, generator)]["data_offsets"].reverse()


@header
def two_tensors_in_one_place(whole: Header, generator: random.Random) -> None:
    whole[_name(whole, generator)]["data_offsets"] = list(whole[_name(whole, generator)]["data_offsets"])


@header
def tensors_exchanged(whole: Header, generator: random.Random) -> None:
    """Of one shape, so that the file is valid, and means something else."""
    first = _name(whole, generator)
    like = [name for name in sorted(whole) if name != "__metadata__" and whole[name]["shape"] == whole[first]["shape"]]
    second = generator.choice([name for name in like if whole[name]["dtype"] == whole[first]["dtype"]])
    whole[first], whole[second] = whole[second], whole[first]


@header
def hostile_metadata(whole: Header, generator: random.Random) -> None:
    values = [hostile(generator), {"format": hostile(generator)}, {"a": {"b": "c"}}, {"format": "np"}, {"format": "tf"}]
    whole["__metadata__"] = generator.choice(values)


@header
def no_metadata(whole: Header, generator: random.Random) -> None:
    del whole["__metadata__"]


@header
def more_in_an_entry(whole: Header, generator: random.Random) -> None:
    whole[_name(whole, generator)][generator.choice(["x", "quantization", ""])] = hostile(generator)


@header
def empty_tensor(whole: Header, generator: random.Random) -> None:
    end = max(entry["data_offsets"][1] for name, entry in whole.items() if name != "__metadata__")
    name = generator.choice(["empty", "model.layers.0.self_attn.q_proj.x", "model.layers.0.self_attn.q_proj.g_idx"])
    whole[name] = {"dtype": "I32", "shape": generator.choice([[0], [0, 4]]), "data_offsets": [end, end]}


@header
def no_header(whole: Header, generator: random.Random) -> Any:
    return generator.choice([{}, [], None, "x", 4, {"__metadata__": {}}])


@content
def blanks_behind(text: bytes, data: bytes, generator: random.Random) -> bytes:
    return join(text + b" " * generator.choice([1, 7, 5000]), data)


@content
def blanks_before(text: bytes, data: bytes, generator: random.Random) -> bytes:
    return join(generator.choice([b" ", b"\n", b"\t"]) + text, data)


@content
def byte_order_mark(text: bytes, data: bytes, generator: random.Random) -> bytes:
    return join(b"\xef\xbb\xbf" + text, data)


@content
def other_encoding(text: bytes, data: bytes, generator: random.Random) -> bytes:
    return join(text.decode().encode(generator.choice(["utf-16", "utf-16-le", "utf-32"])), data)


@content
def nesting(text: bytes, data: bytes, generator: random.Random) -> bytes:
    depth = generator.choice([200, 5_000, 100_000])
    return join(text[:-1] + b', "x": ' + b"[" * depth + b"]" * depth + b"}", data)


@content
def strange_constants(text: bytes, data: bytes, generator: random.Random) -> bytes:
    constant = generator.choice([b"Infinity", b"-Infinity", b"NaN", b"1e400", b"-0", b"9" * 5000, b"1E2"])
    place = text.index(generator.choice([b'"shape": [', b'"data_offsets": ['])) + 10
    return join(text[:place].rstrip(b"0123456789") + constant + b", " + text[place:], data)


@content
def name_twice(text: bytes, data: bytes, generator: random.Random) -> bytes:
    name = generator.choice([name for name in json.loads(text) if name != "__metadata__"])
    own = json.dumps({name: json.loads(text)[name]}).encode()
    wrong = json.dumps({name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    return join(b"{" + generator.choice([own, wrong])[1:-1] + b", " + text[1:], data)


@content
def length(text: bytes, data: bytes, generator: random.Random) -> bytes:
    numbers = [0, 1, 2, len(text) - 1, len(text) + 1, len(text) + len(data), 2**31, 2**63, 2**64 - 1, 100_000_001]
    return struct.pack("<Q", generator.choice(numbers)) + text + data


@content
def long_header(text: bytes, data: bytes, generator: random.Random) -> bytes:
    """More than the hundred megabytes that safetensors reads."""
    return join(text + b" " * 100_000_001, data)


@content
def cut(text: bytes, data: bytes, generator: random.Random) -> bytes:
    whole = join(text, data)
    return whole[: generator.choice([0, 1, 7, 8, 9, generator.randrange(len(whole)), len(whole) - 1])]


@content
def more_data(text: bytes, data: bytes, generator: random.Random) -> bytes:
    return join(text, data + b"\0" * generator.choice([1, 4, 4096]))


@content
def one_byte(text: bytes, data: bytes, generator: random.Random) -> bytes:
    changed = bytearray(text)
    changed[generator.randrange(len(changed))] = generator.choice(b'\0\x80\xff"{}[],:0aA\\')
    return join(bytes(changed), data)


@content
def invalid_text(text: bytes, data: bytes, generator: random.Random) -> bytes:
    entry = generator.choice([b'"\xff": 1', b'"\\ud800": 1', b'"x": "\xed\xa0\x80"', b'"\x1b[31m": 1', b'"a\nb": 1'])
    return join(text[:-1] + b", " + entry + b"}", data)


@content
def other_file(text: bytes, data: bytes, generator: random.Random) -> bytes:
    contents = [
        b"",
        b"\0" * 64,
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        b"PK\3\4" + data,
    ]
    return generator.choice([*contents, b"GGUF" + data, b"<!DOCTYPE html>" * 20, data])
