"""Which versions of an engine are supported, and what is said of the others."""

from __future__ import annotations

import logging
import multiprocessing
import re

from graftq.plugin import switches

logger = logging.getLogger("graftq")


def is_between(version: str, oldest: tuple[int, ...], newest: tuple[int, ...]) -> bool:
    """Whether a version lies in a range, its ends included; one without numbers ("dev") does not."""
    found = re.match(r"\d+(?:\.\d+)+", version)
    return found is not None and oldest <= tuple(map(int, found[0].split(".")))[: len(oldest)] <= newest


def is_first_process() -> bool:
    """Whether an engine has not started this process: its workers would only repeat what the user has been told."""
    return multiprocessing.parent_process() is None


def warn_of_unknown(engine: str, supported: str, found: str) -> None:
    """Say once that checkpoints are left to this version of an engine."""
    if is_first_process():
        logger.warning(
            "graftq knows %s %s, and this is %s: GPTQ checkpoints are left to %s. %s=1 silences this.",
            engine,
            supported,
            found,
            engine,
            switches.DISABLE,
        )
