"""Messages stay readable whatever names a checkpoint uses."""

from __future__ import annotations

import pickle

from graftq.quant_linear.errors import CheckpointError


def test_long_names_and_reasons_are_shortened() -> None:
    error = CheckpointError(f"no place for {'y' * 9_999}", file="f", module="x" * 9_999)
    assert len(str(error)) < 2_500
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_control_characters_are_escaped() -> None:
    assert str(CheckpointError("bad\r\n", file="f\x1b[2J", module="m\N{RIGHT-TO-LEFT OVERRIDE}")).isprintable()
