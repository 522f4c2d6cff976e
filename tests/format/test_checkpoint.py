"""Headers of safetensors files: read as written, and refused when they lie."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from graftq.plugin.checkpoint.fields import is_index
from graftq.plugin.checkpoint.headers import CheckpointIndex
from graftq.quant_linear.errors import CheckpointError

TENSORS = {
    "a.qweight": torch.zeros(4, 8, dtype=torch.int32),
    "a.qzeros": torch.zeros(1, 1, dtype=torch.int32),
    "a.scales": torch.ones(1, 8, dtype=torch.float16),
    "a.bias": torch.ones(8, dtype=torch.float16),
    "norm.weight": torch.ones(3, dtype=torch.bfloat16),
    "b.bias": torch.ones(2),
}


@pytest.fixture
def file(tmp_path: Path) -> str:
    save_file(TENSORS, tmp_path / "m.safetensors")
    return str(tmp_path / "m.safetensors")


def write_header(path: Path, header: Any, payload: bytes) -> str:
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + payload)
    return str(path)


def test_names_shapes_and_dtypes(file: str) -> None:
    found = {name: (info.shape, info.nbytes) for name, info in CheckpointIndex.open([file]).tensors.items()}
    assert found == {name: (tuple(tensor.shape), tensor.nbytes) for name, tensor in TENSORS.items()}


def test_a_projection_is_what_has_packed_tensors(file: str) -> None:
    projections = CheckpointIndex.open([file]).projections()
    assert {module: list(parts) for module, parts in projections.items()} == {
        "a": ["qweight", "qzeros", "scales", "bias"]
    }


def test_read_yields_the_values(file: str) -> None:
    values = dict(CheckpointIndex.open([file]).read(["norm.weight", "a.scales"]))
    assert all(tensor.equal(TENSORS[name]) for name, tensor in values.items())
    assert len(values) == 2


LIES: dict[str, Any] = {
    "no object": [],
    "no offsets": {"a": {"dtype": "F16", "shape": [4]}},
    "no shape": {"a": {"dtype": "F16", "data_offsets": [0, 8]}},
    "shape larger than the bytes": {"a": {"dtype": "F16", "shape": [400], "data_offsets": [0, 8]}},
    "negative size": {"a": {"dtype": "F16", "shape": [-2, -2], "data_offsets": [0, 8]}},
    "negative offset": {"a": {"dtype": "F16", "shape": [4], "data_offsets": [-8, 0]}},
    "overlap": {
        "a": {"dtype": "F16", "shape": [4], "data_offsets": [0, 8]},
        "b": {"dtype": "F16", "shape": [2], "data_offsets": [4, 8]},
    },
    "a gap": {"a": {"dtype": "F16", "shape": [2], "data_offsets": [4, 8]}},
}


@pytest.mark.parametrize("what", LIES)
def test_lying_headers(what: str, tmp_path: Path) -> None:
    file = write_header(tmp_path / "m.safetensors", LIES[what], bytes(8))
    with pytest.raises(CheckpointError, match=r"m\.safetensors: malformed safetensors header"):
        CheckpointIndex.open([file])


def test_a_header_longer_than_the_file(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
        CheckpointIndex.open([str(tmp_path / "m.safetensors")])


def test_errors_survive_pickling() -> None:
    """Workers hand exceptions to their parents that way."""
    import pickle

    error = CheckpointError("why", file="f", module="m")
    copied = pickle.loads(pickle.dumps(error))
    assert (str(copied), copied.file, copied.module, copied.reason) == ("f: m: why", "f", "m", "why")


@pytest.mark.parametrize("prefix", ["", "."])
def test_a_packed_tensor_of_no_module(prefix: str, tmp_path: Path) -> None:
    save_file({f"{prefix}qweight": torch.zeros(4, 8, dtype=torch.int32)}, tmp_path / "m.safetensors")
    index = CheckpointIndex.open([str(tmp_path / "m.safetensors")])
    with pytest.raises(CheckpointError, match=r"qweight: a packed tensor of no module"):
        index.projections()


@pytest.mark.parametrize("letter", ["x", "\x1b", "\n", "\ud800", "\U000e0001", "\u202e"], ids=ascii)
def test_messages_are_short_and_printable(letter: str) -> None:
    error = CheckpointError(f"before {letter * 50_000} after", file=f"f{letter}", module=letter * 50_000)
    message = str(error)
    assert message.isprintable()
    assert len(message) < 2500
    assert "before" in message
    assert message.endswith(" after")
    assert error.module == letter * 50_000


def test_numbers_of_modules() -> None:
    assert [text for text in ("0", "7", "10", "127") if is_index(text)] == ["0", "7", "10", "127"]
    assert not any(map(is_index, ("", "00", "07", "-1", "+1", " 1", "1\n", "\u00b2", "\u0663", "1_0", "9" * 5000)))
