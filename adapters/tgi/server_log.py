"""graftq's messages in the server's log, which shows only loguru records under the server's own name."""

from __future__ import annotations

import logging


class _ToLoguru(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        from loguru import logger

        server = logger.patch(lambda entry: entry.update(name="text_generation_server.graftq"))
        server.opt(exception=record.exc_info).log(record.levelname, "{}", record.getMessage())


def forward() -> None:
    """Pass graftq's messages on to loguru, unless the program has configured logging itself."""
    ours = logging.getLogger("graftq")
    if not ours.hasHandlers():
        ours.addHandler(_ToLoguru())
        ours.setLevel(logging.INFO)
