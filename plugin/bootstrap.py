"""The entry point that ``import torch`` calls. It never raises, and does next to nothing.

torch loads every entry point of the group ``torch.backends`` while it is being imported, and lets an
exception in any of them fail the import. Hence: standard library only, everything caught, and the
real work left to the moment a framework is imported.
"""

from __future__ import annotations

import logging


def autoload() -> None:
    """Put the import hook in place; called by ``import torch``, any number of times."""
    try:
        from graftq.plugin import switches

        if not switches.disabled():
            from graftq.plugin import import_hooks

            import_hooks.install()
    except Exception as error:
        logging.getLogger("graftq").warning(
            "graftq could not start: %s: %s. Nothing is taken over; GRAFTQ_DISABLE=1 silences this.",
            type(error).__name__,
            error,
        )
