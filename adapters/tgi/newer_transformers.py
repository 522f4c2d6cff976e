"""What newer versions of transformers changed, and what keeps the server from serving GPTQ models on them."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from types import ModuleType
from typing import Any

logger = logging.getLogger("graftq")


def mend_video_input() -> None:
    """Put ``VideoInput`` back where the server imports it from, lest it give up all of its flash models."""
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
def mend_load_in_8bit(module: ModuleType) -> Iterator[None]:
    """Keep the server's ``load_in_8bit=False`` from transformers 5, which passes it on to the model, which refuses it.

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
            assert not load_in_8bit  # the server asks for this with bitsandbytes alone
            return stock.from_pretrained(*args, **kwargs)

    logger.info("graftq: kept load_in_8bit from transformers, which does not know it any more")
    vars(module)["AutoModelForCausalLM"] = AutoModelForCausalLM
    try:
        yield
    finally:
        vars(module)["AutoModelForCausalLM"] = stock
