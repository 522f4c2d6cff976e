"""The one place where a checkpoint's JSON is parsed: configurations, indices of shards, headers of safetensors files."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any, NoReturn

from graftq.quant_linear.errors import CheckpointError

SIZE_LIMIT = 100_000_000
"""Bytes of one document; the safetensors library has the same limit for a header."""

DEPTH_LIMIT = 64
"""Levels of nesting; copying a value of a few hundred levels exhausts Python's stack."""

_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
    codecs.BOM_UTF8: "UTF-8 with a byte order mark",
}


def read_object(path: str | Path, file: str) -> dict[str, Any]:
    """Read a file that must hold one JSON object.

    Args:
        path: The file.
        file: How messages call it.

    Raises:
        CheckpointError: if it cannot be read, or for what :func:`parse_object` refuses.
    """
    try:
        with open(path, "rb") as stream:
            content = stream.read(SIZE_LIMIT + 1)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", file=file) from error
    return parse_object(content, file)


def parse_object(content: bytes, file: str, *, is_strict: bool = False) -> dict[str, Any]:
    """Parse one JSON object.

    Args:
        content: The document, in UTF-8 without a byte order mark (RFC 8259).
        file: How messages call it.
        is_strict: Whether to refuse NaN and Infinity, which are not JSON; models' configurations use them.

    Raises:
        CheckpointError: if it is too large, not in UTF-8, nested too deeply, not JSON or not an object, or if a key
            stands twice in an object with different values.
    """
    if len(content) > SIZE_LIMIT:
        raise CheckpointError(f"not valid JSON: more than {SIZE_LIMIT} bytes", file=file)
    for mark, name in _MARKS.items():
        if content.startswith(mark):
            raise CheckpointError(f"not valid JSON: encoded as {name}, not as plain UTF-8", file=file)
    constant = {"parse_constant": _refuse_constant} if is_strict else {}
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_unique, **constant)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"not valid JSON: byte {error.start} is not UTF-8", file=file) from error
    except RecursionError as error:
        raise CheckpointError("not valid JSON: nested too deeply", file=file) from error
    except ValueError as error:
        raise CheckpointError(f"not valid JSON: {error}", file=file) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"holds a {type(value).__name__}, not an object", file=file)
    _check_depth(value, file)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, unless it says two things under one key: parsers differ in which of them they take."""
    found = dict(pairs)
    if len(found) < len(pairs):
        for key, value in pairs:
            if found[key] != value:
                raise ValueError(f"{key!r} stands twice, with different values")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _check_depth(value: dict[str, Any], file: str) -> None:
    level: list[Any] = [value]
    for _ in range(DEPTH_LIMIT):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return
    raise CheckpointError(f"not valid JSON: nested deeper than {DEPTH_LIMIT} levels", file=file)
