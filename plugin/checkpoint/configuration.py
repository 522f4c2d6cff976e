"""Reading the quantization parameters, from ``config.json`` or from ``quantize_config.json``.

Both hold the same keys; a checkpoint has one, the other, or both. Sources: AutoGPTQ's
``BaseQuantizeConfig``, GPTQModel's ``QuantizeConfig`` (``dynamic``, ``checkpoint_format``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftq.plugin.checkpoint.validation import Declared
from graftq.quant_linear.errors import CheckpointError
from graftq.quant_linear.spec import SUPPORTED_BITS

if TYPE_CHECKING:
    from graftq.plugin.checkpoint.source import Source

QUANTIZE_CONFIG = "quantize_config.json"

ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}
"""What is added to a stored zero point, by ``checkpoint_format``."""


@dataclass(frozen=True)
class QuantConfig:
    """The parameters of a checkpoint.

    Attributes:
        declared: What holds for every module.
        dynamic: GPTQModel's per-module overrides: pattern to overrides, in the order of the file;
            a pattern beginning with ``-:`` excludes modules from quantization.
        weight_names: File names (without ending) under which the writer may have stored the weights.
        source: The file the parameters come from, for messages.
    """

    declared: Declared
    dynamic: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    weight_names: tuple[str, ...] = ()
    source: str = ""

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str) -> QuantConfig:
        """Validate the parameters as found in ``source``.

        Raises:
            CheckpointError: for another method or format than GPTQ's, and for values out of range.
        """
        method = str(raw.get("quant_method") or raw.get("method") or "gptq").lower()
        if method != "gptq":
            raise CheckpointError(f"quant_method is {method!r}, not 'gptq'", file=source)
        declared = Declared(
            bits=_integer(raw, "bits", source, allowed=SUPPORTED_BITS),
            group_size=_group_size(raw, source),
            desc_act=bool(raw.get("desc_act", False)),
            sym=None if raw.get("sym") is None else bool(raw["sym"]),
            zero_offset=ZERO_OFFSETS[_format(raw, source)],
        )
        if declared.bits is None:
            raise CheckpointError("bits missing", file=source)
        dynamic = raw.get("dynamic") or {}
        if not isinstance(dynamic, Mapping):
            raise CheckpointError(f"dynamic is a {type(dynamic).__name__}, not an object", file=source)
        for pattern, overrides in dynamic.items():
            _check_rule(pattern, overrides, source)
        stems = [raw.get(key) for key in ("model_file_base_name", "model_basename")]
        group_size = -1 if declared.group_size is None else declared.group_size
        stems.append(autogptq_stem(declared.bits, group_size))
        return cls(declared, dynamic, tuple(dict.fromkeys(str(stem) for stem in stems if stem)), source)

    @property
    def format(self) -> str:
        """The name of the format in ``checkpoint_format``."""
        return next(name for name, offset in ZERO_OFFSETS.items() if offset == self.declared.zero_offset)

    def for_module(self, name: str) -> Declared:
        """What is declared for the module of that name in the checkpoint, ``dynamic`` included."""
        for pattern, overrides in self.dynamic.items():
            if re.match(re.sub(r"^[+-]:", "", pattern), name):
                return self._override(overrides)
        return self.declared

    def _override(self, overrides: Mapping[str, Any]) -> Declared:
        base = self.declared
        return Declared(
            bits=overrides.get("bits", base.bits),
            group_size=overrides.get("group_size", base.group_size),
            desc_act=overrides.get("desc_act", base.desc_act),
            sym=overrides.get("sym", base.sym),
            zero_offset=base.zero_offset,
        )


def autogptq_stem(bits: int, group_size: int) -> str:
    """What AutoGPTQ calls a weight file, without ending."""
    return f"gptq_model-{bits}bit-{group_size}g"


def parse_json(text: str, source: str) -> dict[str, Any]:
    """Parse a configuration file that must hold an object.

    Raises:
        CheckpointError: if it does not.
    """
    try:
        value = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"not valid JSON: {error}", file=source) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"holds a {type(value).__name__}, not an object", file=source)
    return value


def read_declared(source: Source, name: str = QUANTIZE_CONFIG) -> tuple[dict[str, Any], str] | None:
    """What a checkpoint says of itself, and in which file; None if it says nothing.

    In AutoGPTQ's order: the file ``name``, then ``config.json``.

    Raises:
        CheckpointError: if the file is damaged.
    """
    for file in (name, "config.json"):
        path = source.fetch(file)
        if path is None:
            continue
        where = source.describe(file)
        raw = parse_json(Path(path).read_text(encoding="utf-8"), where)
        declared = raw if file == name else raw.get("quantization_config")
        if declared is not None:
            return declared, where
    return None


def _integer(raw: Mapping[str, Any], key: str, source: str, allowed: tuple[int, ...] | None = None) -> int | None:
    value = raw.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not str(value).lstrip("-").isdigit():
        raise CheckpointError(f"{key} is {value!r}, not an integer", file=source)
    if allowed is not None and int(value) not in allowed:
        raise CheckpointError(f"{key} is {value}; GPTQ has {', '.join(map(str, allowed))}", file=source)
    return int(value)


def _group_size(raw: Mapping[str, Any], source: str) -> int | None:
    size = _integer(raw, "group_size", source)
    if size is not None and size != -1 and size <= 0:
        raise CheckpointError(f"group_size is {size}; it must be positive, or -1 for one group", file=source)
    return size


def _format(raw: Mapping[str, Any], source: str) -> str:
    names = {str(raw[key]).lower() for key in ("checkpoint_format", "format") if raw.get(key) is not None}
    if raw.get("is_marlin_format"):
        names.add("marlin")
    if len(names) > 1:
        raise CheckpointError(f"contradictory formats: {' and '.join(sorted(names))}", file=source)
    name = next(iter(names), "gptq")
    if name not in ZERO_OFFSETS:
        raise CheckpointError(f"checkpoint_format is {name!r}; graftq reads {' and '.join(ZERO_OFFSETS)}", file=source)
    return name


def _check_rule(pattern: str, overrides: Any, source: str) -> None:
    try:
        re.compile(re.sub(r"^[+-]:", "", pattern))
    except re.error as error:
        raise CheckpointError(f"dynamic rule {pattern!r} is not a regular expression: {error}", file=source) from error
    if not isinstance(overrides, Mapping):
        raise CheckpointError(f"dynamic rule {pattern!r} overrides nothing", file=source)
    _integer(overrides, "bits", source, allowed=SUPPORTED_BITS)
    _group_size(overrides, source)
