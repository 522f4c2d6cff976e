"""Loading as users do, and the comparison that decides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from support.models import logits, relative_error


def load(checkpoint: Path | str, **arguments: Any) -> Any:
    """The plain call, in float32 unless said otherwise."""
    return AutoModelForCausalLM.from_pretrained(checkpoint, **{"dtype": torch.float32, **arguments})


def assert_right(checkpoint: Path, tolerance: float = 1e-5, **arguments: Any) -> Any:
    """Load ``checkpoint``, hold its logits against its float twin's, and its loading report against a clean one."""
    model, info = load(checkpoint, output_loading_info=True, **arguments)
    assert not any(info.values()), info
    twin = load(checkpoint.parent / "float")
    assert relative_error(logits(model), logits(twin)) < tolerance
    return model
