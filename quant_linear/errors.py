"""Every refusal of a checkpoint, in one shape: which file, which tensor or module, and why."""

from __future__ import annotations

from pathlib import Path

LONGEST_NAME = 300
"""Characters of a tensor's or module's name that a message shows."""

LONGEST_REASON = 2000
"""Characters of a reason, which may quote names and values from files, that a message shows."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded right, and therefore is not loaded at all.

    The message is one line of printable characters, and not a long one, whatever names the checkpoint uses.

    Attributes:
        reason: What is wrong, in words a user can act on.
        file: The file that shows it, if one can be named.
        module: The tensor or module concerned, in the checkpoint's own naming.
    """

    def __init__(self, reason: str, *, file: str | Path | None = None, module: str | None = None):
        self.reason = reason
        self.file = None if file is None else str(file)
        self.module = module
        name, why = printable(module or "", LONGEST_NAME), printable(reason, LONGEST_REASON)
        super().__init__(": ".join(part for part in (printable(self.file or ""), name, why) if part))

    def __reduce__(self):  # keyword-only arguments do not survive the default pickling
        return (_rebuild, (self.reason, self.file, self.module))


def printable(text: str, longest: int | None = None) -> str:
    """The text with control characters, line breaks and the like escaped as in Python's literals.

    Names in a checkpoint may hold any of these, and a terminal would obey them.

    Args:
        text: Any text.
        longest: Characters that the result may have, plus those of the mark where the middle has been left out.
    """
    text = _shortened(text, longest)
    if text.isprintable():
        return text
    escaped = "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
    return _shortened(escaped, longest)


def _shortened(text: str, longest: int | None) -> str:
    """Without its middle: what a message says of a value stands before it, and after it."""
    if longest is None or len(text) <= longest:
        return text
    return f"{text[: longest - longest // 4]} ... {text[-(longest // 4) :]}"


def _rebuild(reason: str, file: str | None, module: str | None) -> CheckpointError:
    return CheckpointError(reason, file=file, module=module)
