"""Which checkpoints an adapter takes over from an engine."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from graftq.adapters.serving.served_config import METHOD
from graftq.plugin.checkpoint import auto_round
from graftq.plugin.checkpoint.configuration import ZERO_OFFSETS

logger = logging.getLogger("graftq")

OURS_TO_TAKE = (None, METHOD, "gptq")
"""Values of an engine's argument ``quantization`` that leave the choice to us; the others name an implementation."""

CHOICES = ("all", "unsupported")
"""What a switch may say: take all GPTQ checkpoints, or those that the engine refuses."""


@dataclass(frozen=True)
class Takeover:
    """How one engine's checkpoints are shared between it and graftq.

    Attributes:
        switch: The environment variable that says which of :data:`CHOICES` it is.
        default: What holds where the variable is not set, or says something else; "" is to take none.
        refuse: Raises, whatever it likes, for GPTQ parameters that the engine itself does not run.
    """

    switch: str
    default: str
    refuse: Callable[[Mapping[str, Any]], object]

    def choice(self) -> str:
        """What the switch says; a warning if that means nothing."""
        value = os.environ.get(self.switch, "").lower()
        if value in ("", *CHOICES):
            return value or self.default
        known = "graftq: %s=%s means nothing; it is 'all' or 'unsupported'. Taking %s."
        logger.warning(known, self.switch, value, self.default or "none")
        return self.default

    def method(self, raw: Mapping[str, Any], asked: str | None) -> str | None:
        """The name of our method for a checkpoint that is ours, and None for the others.

        Args:
            raw: The checkpoint's ``quantization_config``.
            asked: The method that the user has asked the engine for.
        """
        method = str(raw.get("quant_method", "")).lower()
        if asked not in OURS_TO_TAKE or method not in ("gptq", *auto_round.SPELLINGS):
            return None
        if asked == METHOD:
            return METHOD
        if method != "gptq":
            return self._auto_round(raw)
        layout = str(raw.get("checkpoint_format") or raw.get("format") or "gptq").lower()
        if layout not in ZERO_OFFSETS:
            return None
        return None if self.choice() == "unsupported" and self._engine_takes(raw) else METHOD

    def _auto_round(self, raw: Mapping[str, Any]) -> str | None:
        where = "quantization_config"
        if auto_round.refusal(raw, where) is not None:
            return None
        if self.choice() == "unsupported":
            modules = (raw.get("extra_config") or {}).items()
            quantized = [own for _, own in modules if int(own.get("bits", 0)) < auto_round.UNQUANTIZED]
            gptq = auto_round.as_gptq(raw, where)
            every = ({"desc_act": False, "sym": True, **gptq, **own} for own in [{}, *quantized])
            if all(map(self._engine_takes, every)) and gptq["checkpoint_format"] == "gptq":
                return None
        return METHOD

    def _engine_takes(self, raw: Mapping[str, Any]) -> bool:
        """Whether the engine's own GPTQ method accepts these parameters, each rule of ``dynamic`` included."""
        rules = (raw.get("dynamic") or {}).items()
        overrides = [rule for pattern, rule in rules if not pattern.startswith("-:")]
        try:
            for rule in [{}, *overrides]:
                self.refuse({**raw, "dynamic": {}, **rule})
        except Exception:  # whatever the engine raises, it is a refusal
            return False
        return True
