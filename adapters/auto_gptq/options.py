"""The keyword arguments of ``from_quantized`` that are not its own: passed on, without meaning here, or unknown."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from graftq.plugin.checkpoint.source import HUB_ARGUMENTS

logger = logging.getLogger("graftq")

PASSED_ON = (*HUB_ARGUMENTS, "attn_implementation", "code_revision", "dtype", "offload_folder", "proxies")
"""What goes to transformers as it is."""

AS_ALWAYS = ("low_cpu_mem_usage", "trainable", "use_cuda_fp16", "resume_download")
"""What transformers and graftq do, or do without, in any case."""

WITHOUT_MEANING = {
    "use_triton": False,
    "use_tritonv2": False,
    "use_marlin": False,
    "use_qigen": False,
    "inject_fused_attention": False,
    "inject_fused_mlp": False,
    "warmup_triton": False,
    "disable_exllama": None,
    "disable_exllamav2": False,
}
"""How AutoGPTQ chose its kernels, with the defaults of its last release."""


def sort_out(options: Mapping[str, Any]) -> dict[str, Any]:
    """Say in one warning which options have no effect, and return those for transformers.

    An option that asks for nothing but AutoGPTQ's default is not worth a word.
    """
    without_meaning = sorted(
        name
        for name, value in options.items()
        if name in WITHOUT_MEANING and value not in (None, WITHOUT_MEANING[name])
    )
    renamed = {"use_auth_token": "token"}
    options = {renamed.get(name, name): value for name, value in options.items()}
    unknown = sorted(options.keys() - {*PASSED_ON, *AS_ALWAYS, *WITHOUT_MEANING})
    parts = []
    if without_meaning:
        parts.append(f"{', '.join(without_meaning)}: without meaning, as graftq chooses its kernels (GRAFTQ_KERNEL)")
    if unknown:
        parts.append(f"{', '.join(unknown)}: unknown")
    if parts:
        logger.warning("graftq: from_quantized ignores %s", "; ".join(parts))
    return {name: options[name] for name in PASSED_ON if options.get(name) is not None}
