"""The one place where a parameter of a checkpoint is read: its type, its range, its name in messages."""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from graftq.quant_linear.errors import CheckpointError

LONGEST_NAME = 255
"""Bytes of a file's name that file systems allow."""

LONGEST_ENDING = len(".safetensors.index.json")
"""Bytes that may follow the name of a weight file that is stated without its ending."""


@dataclass(frozen=True)
class Fields:
    """Parameters that come from a file, or from a caller in the same form; None stands for an absent one.

    Attributes:
        raw: The parameters.
        file: The file, for messages.
        within: What messages put in front of a parameter's name.
    """

    raw: Mapping[str, Any]
    file: str
    within: str = ""

    def fail(self, key: str, why: str) -> CheckpointError:
        """The refusal of a parameter: ``why`` continues a sentence that tells its value."""
        return CheckpointError(f"{self.within}{key} is {brief(self.raw[key])}{why}", file=self.file)

    def integer(self, key: str, allowed: Sequence[int] = ()) -> int | None:
        """An integer of at most nine digits, which may also be a string of them; one of ``allowed``, if there are any.

        Raises:
            CheckpointError: for anything else.
        """
        value = self.raw.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, str)) or not re.fullmatch("-?[0-9]+", str(value)):
            raise self.fail(key, ", not an integer")
        if len(str(value)) > 9:
            raise self.fail(key, ", out of range")
        if allowed and int(value) not in allowed:
            raise self.fail(key, f"; GPTQ has {', '.join(map(str, allowed))}")
        return int(value)

    def boolean(self, key: str) -> bool | None:
        """True, False, 1 or 0.

        Raises:
            CheckpointError: for anything else; a string "false" would be true to Python.
        """
        value = self.raw.get(key)
        if value is None:
            return None
        if not isinstance(value, int) or value not in (0, 1):
            raise self.fail(key, ", neither true nor false")
        return bool(value)

    def word(self, key: str) -> str | None:
        """A string in lower case without blanks around it; None if nothing is left.

        Raises:
            CheckpointError: for anything but a string.
        """
        value = self.raw.get(key)
        if value is None:
            return None
        if not isinstance(value, str):
            raise self.fail(key, ", not a string")
        return value.strip().lower() or None

    def file_stem(self, key: str) -> str | None:
        """The name of a file, without its ending; None if it is empty.

        Raises:
            CheckpointError: for anything but a string, and for names that :func:`check_file_name` refuses.
        """
        value = self.raw.get(key)
        if value is None or value == "":
            return None
        if not isinstance(value, str):
            raise self.fail(key, ", not a string")
        check_file_name(value, self.within + key, self.file, LONGEST_NAME - LONGEST_ENDING)
        return value


def check_file_name(name: str, what: str, file: str, longest: int = LONGEST_NAME) -> None:
    """Refuse a name found in a checkpoint that is more than the name of a file in the checkpoint's own folder.

    Anything else would reach other files of this machine and, with the user's token, other repositories of the Hub.

    Args:
        name: The name.
        what: What names it, for messages.
        file: The file that states it.
        longest: Bytes it may have.

    Raises:
        CheckpointError: unless it is one component of a path, on any system, of at most that many bytes.
    """
    is_component = PurePosixPath(name).parts == PureWindowsPath(name).parts == (name,) and name != ".."
    if not is_component or "\0" in name:
        raise CheckpointError(f"{what} names a file outside: {brief(name)}", file=file)
    try:
        size = len(os.fsencode(name))
    except UnicodeEncodeError:
        size = LONGEST_NAME + 1
    if size > longest:
        raise CheckpointError(f"{what} names a file as no file can be called: {brief(name)}", file=file)


def is_index(part: str) -> bool:
    """Whether a part of a module's name is a number as modules are counted: no other name stands for the same one."""
    return re.fullmatch("0|[1-9][0-9]{0,8}", part) is not None


def brief(value: Any) -> str:
    """A value for a message, shortened."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 100
    return short.repr(value)
