"""vLLM: GPTQ checkpoints by its own plugin interface, the entry points of ``vllm.general_plugins``.

Covered: vLLM 0.30 to 0.33. This module is imported, and :func:`register` called, in every process that vLLM starts;
neither costs more than vLLM's own start-up, and neither ever raises.
"""

from __future__ import annotations

import logging

from graftq.plugin import failures, switches

logger = logging.getLogger("graftq")


def register() -> None:
    """Register the method that takes GPTQ checkpoints over; called by vLLM, any number of times."""
    try:
        if not switches.disabled():
            _register()
    except Exception as error:  # vLLM does not guard this call
        failures.record("taking over vLLM's GPTQ loading", error)


def _register() -> None:
    from graftq.adapters.serving.versions import is_first_process, warn_of_unknown
    from graftq.adapters.vllm import versions

    found = versions.installed()
    if not versions.known(found):
        warn_of_unknown("vLLM", versions.RANGE, found)
        return
    from graftq.adapters.serving.served_config import METHOD
    from graftq.adapters.vllm import stock
    from graftq.adapters.vllm.config import GraftqConfig

    if METHOD in stock.QUANTIZATION_METHODS:
        return
    stock.register_quantization_config(METHOD)(GraftqConfig)
    if is_first_process():
        logger.info(
            "graftq took over GPTQ loading in vllm %s (quantization=%r); %s=1 switches it off",
            found,
            METHOD,
            switches.DISABLE,
        )
