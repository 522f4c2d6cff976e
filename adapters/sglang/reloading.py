"""Other weights for a running engine, which packed layers do not take."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn


def refuse(*arguments: Any, **named: Any) -> NoReturn:
    """What reloading comes to, instead of going on with the old weights without a word.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError("graftq's layers take no other weights once they are packed; start SGLang again")


def refuse_to_reload(left: nn.Parameter) -> None:
    """Let the parameter that a packed layer has left refuse further tensors."""
    left.weight_loader = refuse  # type: ignore[attr-defined]
