"""The extra keyword arguments of ``from_quantized``: passed on, without effect here, or unknown."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from graftq.plugin.checkpoint.source import HUB_ARGUMENTS

logger = logging.getLogger("graftq")

PASSED_ON = (*HUB_ARGUMENTS, "attn_implementation", "code_revision", "dtype", "offload_folder", "proxies")
"""Arguments that transformers gets unchanged."""

ALWAYS_ON_OR_OFF = ("low_cpu_mem_usage", "trainable", "use_cuda_fp16", "resume_download")
"""Arguments whose value makes no difference: transformers and graftq always do this, or never."""

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
"""Arguments by which AutoGPTQ chose its kernels, with the defaults of its last release."""


def sort_out(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options for transformers; log one warning that names those without effect.

    An option with AutoGPTQ's default value is not mentioned.
    """
    without_meaning = sorted(
        name
        for name, value in options.items()
        if name in WITHOUT_MEANING and value not in (None, WITHOUT_MEANING[name])
    )
    renamed = {"use_auth_token": "token"}
    options = {renamed.get(name, name): value for name, value in options.items()}
    unknown = sorted(options.keys() - {*PASSED_ON, *ALWAYS_ON_OR_OFF, *WITHOUT_MEANING})
    parts = []
    if without_meaning:
        parts.append(f"{', '.join(without_meaning)}: without meaning, as graftq chooses its kernels (GRAFTQ_KERNEL)")
    if unknown:
        parts.append(f"{', '.join(unknown)}: unknown")
    if parts:
        logger.warning("graftq: from_quantized ignores %s", "; ".join(parts))
    return {name: options[name] for name in PASSED_ON if options.get(name) is not None}
