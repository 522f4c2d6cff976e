"""Every refusal of a checkpoint, in one shape: which file, which tensor or module, and why."""

from __future__ import annotations

from pathlib import Path

LONGEST = 300
"""Characters of a name that a message shows."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded right, and therefore is not loaded at all.

    The message is one line of printable characters, whatever names the checkpoint uses.

    Attributes:
        reason: What is wrong, in words a user can act on.
        file: The file that shows it, if one can be named.
        module: The tensor or module concerned, in the checkpoint's own naming.
    """

    def __init__(self, reason: str, *, file: str | Path | None = None, module: str | None = None):
        self.reason = reason
        self.file = None if file is None else str(file)
        self.module = module
        name = f"{module[:LONGEST]}..." if module and len(module) > LONGEST else module
        super().__init__(printable(": ".join(part for part in (self.file, name, reason) if part)))

    def __reduce__(self):  # keyword-only arguments do not survive the default pickling
        return (_rebuild, (self.reason, self.file, self.module))


def printable(text: str) -> str:
    """The text with control characters, line breaks and the like escaped as in Python's literals.

    Names in a checkpoint may hold any of these, and a terminal would obey them.
    """
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def _rebuild(reason: str, file: str | None, module: str | None) -> CheckpointError:
    return CheckpointError(reason, file=file, module=module)
