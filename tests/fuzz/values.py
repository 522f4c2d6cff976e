"""Values that a JSON file may hold where a number, a name or an object is expected."""

from __future__ import annotations

import random
from typing import Any


def nested(depth: int) -> Any:
    """A list in a list in a list."""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


TEXTS = ["", " ", "4", " 4 ", "²", "--4", "٤", "4.0", "1e1", "true", "None", "gptq", "ptb", "\0", "\x1b[31mred", "a\nb"]
NUMBERS = [0, 1, -1, -2, 3, 5, 7, 16, 33, 2**31, 2**63, 10**400, 0.5, 4.5, -0.0, 1e400, -1e400, float("nan")]
OTHERS = [None, True, False, [], [4], [None], {}, {"bits": 4}, {"": {}}, "x" * 5000, "\ud800", nested(50)]
HOSTILE = [*TEXTS, *NUMBERS, *OTHERS]


def hostile(generator: random.Random) -> Any:
    """One of them."""
    return generator.choice(HOSTILE)
