"""JSON that is not what it should be is refused by the one reader, in words."""

from __future__ import annotations

from pathlib import Path

import pytest

from graftq.plugin.checkpoint.json_files import SIZE_LIMIT, parse_object, read_object
from graftq.quant_linear.errors import CheckpointError

DAMAGED = {
    "UTF-16": ('{"bits": 4}'.encode("utf-16"), "encoded as UTF-16"),
    "UTF-32": ('{"bits": 4}'.encode("utf-32"), "encoded as UTF-32"),
    "a byte order mark": (b'\xef\xbb\xbf{"bits": 4}', "byte order mark"),
    "latin-1": (b'{"bits": 4, "by": "Andr\xe9"}', "byte 23 is not UTF-8"),
    "empty": (b"", "not valid JSON"),
    "cut off": (b'{"bits": 4', "not valid JSON"),
    "a list": (b"[]", "holds a list, not an object"),
    "deep": (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
    "deeper than a copy survives": (b'{"meta": ' + b"[" * 70 + b"]" * 70 + b"}", "nested deeper than 64 levels"),
    "two values under one key": (b'{"bits": 4, "bits": 8}', "'bits' stands twice, with different values"),
    "a number of 5,000 digits": (b'{"bits": ' + b"9" * 5000 + b"}", "not valid JSON"),
    "too large": (b" " * (SIZE_LIMIT + 1), "more than 100000000 bytes"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged(what: str) -> None:
    content, message = DAMAGED[what]
    with pytest.raises(CheckpointError, match=message) as caught:
        parse_object(content, "f.json")
    assert caught.value.file == "f.json"


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_only_models_configurations_may_hold_what_is_no_number(constant: str) -> None:
    content = f'{{"time_step_limit": [0, {constant}]}}'.encode()
    assert parse_object(content, "config.json")
    with pytest.raises(CheckpointError, match=f"{constant} is not JSON"):
        parse_object(content, "m.safetensors", is_strict=True)


def test_a_key_that_stands_twice_with_one_value() -> None:
    assert parse_object(b'{"bits": 4, "bits": 4}', "f.json") == {"bits": 4}


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="f: cannot be read: Is a directory"):
        read_object(tmp_path, "f")
