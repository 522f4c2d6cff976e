"""What went wrong inside graftq without the host noticing: one warning each, and a record for ``graftq doctor``."""

from __future__ import annotations

import logging

from graftq.plugin.switches import DISABLE

logger = logging.getLogger("graftq")

CONTAINED = (Exception, SystemExit)
"""What is caught from the code of others. Ctrl-C goes through."""

recorded: dict[str, str] = {}
"""What failed, to why; in the order of events."""


def record(what: str, error: BaseException) -> None:
    """Warn, once for each cause, that ``what`` failed, and how to switch graftq off."""
    why = " ".join(f"{type(error).__name__}: {error}".split())  # one line, as some messages have many
    if why not in recorded.values():
        logger.warning("graftq: %s failed, and is left out: %s. %s=1 switches graftq off.", what, why, DISABLE)
    recorded[what] = why
