"""The entry point that ``import torch`` calls. It never raises, and does next to nothing.

torch loads every entry point of the group ``torch.backends`` while it is being imported, and lets an
exception in any of them fail the import. Hence: standard library only, everything caught, and the
real work left to the moment a framework is imported.
"""

from __future__ import annotations

import logging
import os

SWITCH = "GRAFTQ_DISABLE"


def disabled() -> bool:
    """Whether the user has switched graftq off (``GRAFTQ_DISABLE`` set to anything but "" or "0")."""
    return os.environ.get(SWITCH, "") not in ("", "0")


def autoload() -> None:
    """Put the import hook in place; called by ``import torch``, any number of times."""
    try:
        if not disabled():
            from graftq.plugin import import_hooks

            import_hooks.install()
    except Exception as error:
        logging.getLogger("graftq").warning(
            "graftq could not start: %s: %s. Nothing is taken over; %s=1 silences this.",
            type(error).__name__,
            error,
            SWITCH,
        )
