"""JSON files as bytes: encodings, nesting, sizes, keys twice."""

from __future__ import annotations

import random

from fuzz.checkpoint import BESIDE, INDEX, INSIDE, Checkpoint
from fuzz.registry import Function, mutation

Bytes = bytes


def _enter(name: str, change) -> Function:
    """Enter a change to the text of one of the checkpoint's JSON files."""

    def function(checkpoint: Checkpoint, generator: random.Random) -> None:
        checkpoint.accept = "base"
        there = (
            [INSIDE] * 2 + [BESIDE] * 2 * (checkpoint.beside is not None) + [INDEX] * 3 * (checkpoint.index is not None)
        )
        checkpoint.rewrite[generator.choice(there)] = lambda text: change(text, generator)

    function.__name__ = name
    return mutation("texts")(function)


def _with(text: bytes, entry: bytes) -> bytes:
    return text.rstrip()[:-1] + b", " + entry + b"}"


def _first(text: bytes, entry: bytes) -> bytes:
    return b"{" + entry + b", " + text.lstrip()[1:]


def _cut(text: bytes, generator: random.Random) -> bytes:
    return text[: generator.randrange(len(text))]


def _flip(text: bytes, generator: random.Random) -> bytes:
    changed = bytearray(text)
    changed[generator.randrange(len(changed))] = generator.choice([0, 0x80, 0xFF, 0x22, 0x7D, 0x5B, 0x5C])
    return bytes(changed)


CONTENTS = [
    b"",
    b" ",
    b"null",
    b"[]",
    b'"gptq"',
    b"42",
    b"{",
    b"{}",
    b"NaN",
    b"\0" * 100,
    b"{'bits': 4}",
    b'{"a": 1}{}',
]

_enter("utf_16", lambda text, generator: text.decode().encode(generator.choice(["utf-16", "utf-16-le", "utf-32"])))
_enter("byte_order_mark", lambda text, generator: b"\xef\xbb\xbf" + text)
_enter("latin_1", lambda text, generator: _with(text, '"note": "é"'.encode("latin-1")))
_enter("invalid_utf_8", lambda text, generator: _with(text, b'"note": "\xed\xa0\x80\xff"'))
_enter("deep_nesting", lambda text, generator: _with(text, b'"meta": ' + b"[" * 100_000 + b"]" * 100_000))
_enter("deep_objects", lambda text, generator: _with(text, b'"meta": ' + b'{"a":' * 5_000 + b"1" + b"}" * 5_000))
_enter("unclosed_nesting", lambda text, generator: _with(text, b'"meta": ' + b"[" * 200_000))
_enter("huge_number", lambda text, generator: _with(text, b'"bits": ' + b"9" * 5_000))
_enter("huge_exponent", lambda text, generator: _with(text, b'"group_size": 1e999999999'))
_enter("bits_twice", lambda text, generator: _first(text, b'"bits": 5, "bits": 4, "group_size": 7'))
_enter(
    "parameters_twice", lambda text, generator: _first(text, b'"quantization_config": {"bits": 5}, "weight_map": {}')
)
_enter("cut", _cut)
_enter("one_byte", _flip)
_enter("other_content", lambda text, generator: generator.choice(CONTENTS))
_enter("trailing_comma", lambda text, generator: text[:-1] + b",}")
_enter("comment", lambda text, generator: b"// written by a tool\n" + text)
_enter("megabytes_of_blanks", lambda text, generator: text[:-1] + b" " * 20_000_000 + b"}")
_enter("control_characters", lambda text, generator: _with(text, b'"note": "\x1b[31m\x00"'))
