"""What comes of loading one case by the plain call, and of inspecting it."""

from __future__ import annotations

import contextlib
import functools
import io
import re
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from support.models import logits, relative_error
from transformers import AutoConfig, AutoModelForCausalLM

from fuzz.bases import Base
from fuzz.cases import Case
from fuzz.checkpoint import Checkpoint
from fuzz.truth import NoMeaning, plain_state, tensors_of, twin_logits
from graftq.plugin.cli.main import main
from graftq.quant_linear.errors import CheckpointError

INTERNAL = re.compile(
    r"'NoneType'|unhashable|subscriptable|not iterable|has no attribute|indices must be|unsupported operand|"
    r"invalid literal|not supported between|positional argument|values to unpack|must be str|(^|: )'\w+'$"
)
"""Reasons that are Python's and say nothing to a user."""

TOLERANCES = {torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
LONGEST_MESSAGE = 5000


def judge(case: Case) -> dict[str, str]:
    """The verdict on loading ("load", "load_detail") and on inspecting ("inspect", "inspect_detail")."""
    checkpoint = case.build()
    with tempfile.TemporaryDirectory(prefix="case-") as folder:
        checkpoint.write(Path(folder))
        said: dict[str, str] = {}
        said["inspect"], said["inspect_detail"] = _inspect(folder, checkpoint)
        said["load"], said["load_detail"] = _load(Path(folder), checkpoint, case.base)
    return {key: value.replace(folder, "<folder>") for key, value in said.items()}


def _inspect(folder: str, checkpoint: Checkpoint) -> tuple[str, str]:
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(["inspect", folder])
    except Exception:
        return "traceback", _tail()
    printed = out.getvalue() + err.getvalue()
    if status not in (0, 1):
        return "status", str(status)
    if raw := _raw_characters(printed.replace("\n", "").replace("\t", "")):
        return "raw characters printed", repr(raw)
    if status and checkpoint.must_load:
        return "refused, though harmless", printed[-600:]
    return ("right", "") if status == 0 else ("clear", printed[-300:])


def _load(folder: Path, checkpoint: Checkpoint, base: Base) -> tuple[str, str]:
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, **checkpoint.arguments)
    except CheckpointError as error:
        return _clear(error, checkpoint)
    except Exception as error:
        return _raised(error, _tail(), folder, checkpoint, "raises")
    try:
        found = logits(model)
    except Exception as error:
        return _raised(error, _tail(), folder, checkpoint, "loads, and raises when run")
    verdict = _held_against_truth(found, model.dtype, folder, checkpoint, base)
    if verdict[0] == "right" or model.dtype == torch.float32:
        return verdict
    # Half precision can choose other experts, and has no grouped product for some sizes: are the files read right?
    exact = AutoModelForCausalLM.from_pretrained(folder, **{**checkpoint.arguments, "dtype": torch.float32})
    again = _held_against_truth(logits(exact), torch.float32, folder, checkpoint, base)
    return ("right", f"in float32 {again[1]}; {verdict[1]}") if again[0] == "right" else verdict


def _held_against_truth(
    found: torch.Tensor, dtype: torch.dtype, folder: Path, checkpoint: Checkpoint, base: Base
) -> tuple[str, str]:
    try:
        truth = _truth(folder, checkpoint, base)
        return _compare(found, dtype, lambda wanted: truth(wanted or (dtype if dtype == torch.float32 else None)))
    except NoMeaning as reason:
        return "wrong in silence", f"loads, though it has no meaning: {reason}"
    except Exception:
        return "wrong in silence", f"loads, where the float twin raises: {_tail()}"


def _clear(error: CheckpointError, checkpoint: Checkpoint) -> tuple[str, str]:
    message = str(error)
    if checkpoint.must_load:
        return "refused, though harmless", message
    if not error.file and not error.module:
        return "names neither file nor module", message
    if INTERNAL.search(error.reason) or len(error.reason.split()) < 2:
        return "internal reason", message
    if raw := _raw_characters(message):
        return "raw characters in the message", f"{raw!r} in {message[:300]!r}"
    if len(message) > LONGEST_MESSAGE:
        return "message too long", message[:300]
    return "clear", message[:300]


def _raised(error: Exception, tail: str, folder: Path, checkpoint: Checkpoint, what: str) -> tuple[str, str]:
    """transformers' own: the float twin or the configuration alone raises it in the same place, or no file is found."""
    if checkpoint.must_load:
        return "refused, though harmless", tail
    is_its = _place(error)[0].startswith(str(Path(transformers.__file__).parent))
    if is_its and isinstance(error, OSError | ValueError) and str(folder) in str(error):
        return "transformers' own", str(error)
    for without_graftq in (lambda: _twin_of_fields(checkpoint), lambda: AutoConfig.from_pretrained(folder)):
        try:
            without_graftq()
        except Exception as other:
            if (type(other), _place(other)) == (type(error), _place(error)):
                return "transformers' own", f"{type(error).__name__}: {error}"[:300]
    return what, tail


def _twin_of_fields(checkpoint: Checkpoint) -> None:
    """Make the float twin of the undamaged tensors under the case's own fields of ``config.json``."""
    tensors = {name: tensor for content in checkpoint.shards.values() for name, tensor in content.items()}
    twin_logits(checkpoint, plain_state(checkpoint, tensors))


def _truth(folder: Path, checkpoint: Checkpoint, base: Base) -> Callable[[torch.dtype | None], torch.Tensor]:
    if checkpoint.accept == "nothing":
        raise NoMeaning("nothing is right here")
    if checkpoint.accept == "base":
        return lambda dtype: _base_logits(base, dtype)
    state = plain_state(checkpoint, tensors_of(folder))
    return lambda dtype: twin_logits(checkpoint, state, dtype)


@functools.cache
def _base_logits(base: Base, dtype: torch.dtype | None) -> torch.Tensor:
    checkpoint = base.checkpoint()
    tensors = {name: tensor for content in checkpoint.shards.values() for name, tensor in content.items()}
    return twin_logits(checkpoint, plain_state(checkpoint, tensors), dtype)


def _compare(found: torch.Tensor, dtype: torch.dtype, truth: Callable[[Any], torch.Tensor]) -> tuple[str, str]:
    expected = truth(None)
    if found.shape != expected.shape:
        return "wrong in silence", f"logits {tuple(found.shape)} for {tuple(expected.shape)}"
    error = relative_error(found, expected)
    tolerance = TOLERANCES.get(dtype, 2e-5)
    if error < tolerance:
        return "right", f"{error:.1e}"
    # Damaged weights may be such that rounding alone moves the logits: see what it does to the twin.
    rounding = relative_error(expected, truth(torch.float64))
    if error < max(tolerance, 20 * rounding):
        return "right", f"{error:.1e}; rounding moves the twin by {rounding:.1e}"
    return "wrong in silence", f"relative error {error:.2g}"


def _place(error: BaseException) -> tuple[str, int]:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return last.filename, last.lineno or 0


def _tail() -> str:
    lines = traceback.format_exc().strip().splitlines()
    places = [line.strip() for line in lines if line.strip().startswith("File ")]
    return " | ".join([*places[-3:], lines[-1]])[:1500]


def _raw_characters(text: str) -> str:
    return "".join(sorted({character for character in text if not character.isprintable()}))
