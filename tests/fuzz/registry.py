"""Where mutations enter themselves."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from fuzz.checkpoint import Checkpoint

Function = Callable[[Checkpoint, random.Random], None]


@dataclass(frozen=True)
class Mutation:
    """A way to damage a checkpoint.

    Attributes:
        name: What its reports call it.
        function: Changes a checkpoint in place, and says there what may come of loading it.
        wanted: Attributes that the base must have.
    """

    name: str
    function: Function
    wanted: dict[str, object]


KINDS: dict[str, list[Mutation]] = {}
"""Mutations by kind."""


def mutation(kind: str, **wanted: object) -> Callable[[Function], Function]:
    """Enter a function as a mutation of that kind, for bases with the attributes ``wanted``."""

    def enter(function: Function) -> Function:
        KINDS.setdefault(kind, []).append(Mutation(function.__name__, function, wanted))
        return function

    return enter
