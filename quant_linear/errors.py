"""Every refusal of a checkpoint, in one shape: which file, which tensor or module, and why."""

from __future__ import annotations

from pathlib import Path


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded right, and therefore is not loaded at all.

    Attributes:
        reason: What is wrong, in words a user can act on.
        file: The file that shows it, if one can be named.
        module: The tensor or module concerned, in the checkpoint's own naming.
    """

    def __init__(self, reason: str, *, file: str | Path | None = None, module: str | None = None):
        self.reason = reason
        self.file = None if file is None else str(file)
        self.module = module
        where = ": ".join(part for part in (self.file, self.module) if part)
        super().__init__(f"{where}: {reason}" if where else reason)

    def __reduce__(self):  # keyword-only arguments do not survive the default pickling
        return (_rebuild, (self.reason, self.file, self.module))


def _rebuild(reason: str, file: str | None, module: str | None) -> CheckpointError:
    return CheckpointError(reason, file=file, module=module)
