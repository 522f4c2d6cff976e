"""SGLang: GPTQ checkpoints by its own plugin interface, the entry points of ``sglang.srt.plugins``. Experimental.

Covered: SGLang 0.5.23. This module is imported, and :func:`register` called, in every process that SGLang starts.
Nothing happens unless the user switches the adapter on, and neither ever raises.
"""

from __future__ import annotations

import logging
import os

from graftq.plugin import failures, switches

logger = logging.getLogger("graftq")


def register() -> None:
    """Register the method that takes GPTQ checkpoints over, if it is switched on; called by SGLang."""
    try:
        if os.environ.get(switches.SGLANG) and not switches.disabled():
            _register()
    except Exception as error:  # SGLang would log a traceback
        failures.record("taking over SGLang's GPTQ loading", error)


def _register() -> None:
    from graftq.adapters.serving.versions import is_first_process, warn_of_unknown
    from graftq.adapters.sglang import versions

    found = versions.installed()
    if not versions.known(found):
        warn_of_unknown("SGLang", versions.RANGE, found)
        return
    from graftq.adapters.sglang import takeover

    if takeover.take_over() and is_first_process():
        logger.info(
            "graftq took over GPTQ loading in sglang %s (--quantization %s); this is experimental, and %s=1 switches "
            "it off",
            found,
            takeover.METHOD,
            switches.DISABLE,
        )
