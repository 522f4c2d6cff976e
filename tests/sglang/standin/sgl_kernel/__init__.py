"""A stand-in for SGLang's compiled kernels, which no index has for CPUs.

SGLang imports some functions of theirs there that serve speculative decoding, which the tests do not use. All else it
computes by torch, as on CPUs whose instructions the kernels do not know.
"""

from __future__ import annotations

from typing import Any, NoReturn


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)

    def refuse(*arguments: object) -> NoReturn:
        raise NotImplementedError(name)

    return refuse
