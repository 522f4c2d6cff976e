"""What newer versions of transformers changed so that the server cannot serve GPTQ models with them."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from types import ModuleType
from typing import Any

logger = logging.getLogger("graftq")


def restore_video_input() -> None:
    """Put ``VideoInput`` back where the server imports it from; without it, all flash models are disabled."""
    old_place: Any = importlib.import_module("transformers.image_utils")
    if hasattr(old_place, "VideoInput"):
        return
    try:
        from transformers.video_utils import VideoInput
    except ImportError:
        return
    old_place.VideoInput = VideoInput
    logger.info(
        "graftq: put transformers.video_utils.VideoInput back into transformers.image_utils, where "
        "text-generation-inference looks for it"
    )


@contextmanager
def without_load_in_8bit(module: ModuleType) -> Iterator[None]:
    """Drop the server's ``load_in_8bit=False``: transformers 5 passes it on to the model, whose constructor rejects it.

    Args:
        module: Whose ``AutoModelForCausalLM`` is to accept the argument until the block is left.
    """
    stock: Any = vars(module).get("AutoModelForCausalLM")
    if stock is None or int(version("transformers").split(".")[0]) < 5:
        yield
        return

    class AutoModelForCausalLM(stock):
        @classmethod
        def from_pretrained(cls, *args: Any, load_in_8bit: bool = False, **kwargs: Any) -> Any:
            assert not load_in_8bit  # the server sets it only for bitsandbytes
            return stock.from_pretrained(*args, **kwargs)

    logger.info("graftq: kept load_in_8bit from transformers, which does not know it any more")
    vars(module)["AutoModelForCausalLM"] = AutoModelForCausalLM
    try:
        yield
    finally:
        vars(module)["AutoModelForCausalLM"] = stock
