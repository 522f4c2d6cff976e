"""AutoRound's parameters (``quant_method: auto-round``), where its packing is GPTQ's.

AutoRound packs in a dozen ways, and names the one in ``packing_format``. Two of them are GPTQ's tensors: ``auto_gptq``
stores zero points less one, as format ``gptq`` does, and ``gptqmodel`` as they are, as ``gptq_v2``. What differs by
module is in ``extra_config``: its keys are names of modules, or regular expressions that are searched in these, and
what it says of one module counts before what it says of many. Source: AutoRound 0.16's exporters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from graftq.plugin.checkpoint.fields import Fields, brief
from graftq.plugin.checkpoint.rules import Rules
from graftq.quant_linear.errors import CheckpointError

METHOD = "auto-round"
"""What its ``quant_method`` is called here, and by transformers."""

SPELLINGS = (METHOD, "auto_round", "autoround", "intel/auto-round")

FORMATS = {"auto_gptq": "gptq", "gptq": "gptq", "gptqmodel": "gptq_v2"}
"""``checkpoint_format`` by what follows ``auto_round:`` in ``packing_format``."""

OTHERS = {
    r"(auto_)?awq": "AWQ's packing",
    r".*fp8": "8-bit floats",
    r".*fp4|.*fp_?\d*": "4-bit floats",
    r"mx.*": "microscaling",
    r"llm_compressor.*": "compressed-tensors' packing",
    r"mlx": "MLX's packing",
    r"fake": "weights that are not packed",
}
"""What other packings are, for messages; all else is AutoRound's own."""

WRAPPERS = frozenset(("model", "language_model", "text_model", "transformer"))
"""Parts of names that a model adds around its layers or takes away, in memory or in its files."""

UNQUANTIZED = 16
"""Bits from which on a module is none of GPTQ's."""


def refusal(raw: Mapping[str, Any], file: str) -> CheckpointError | None:
    """Why the parameters describe something else than GPTQ's tensors; None if they describe these.

    Raises:
        CheckpointError: if a parameter is damaged.
    """
    fields = Fields(raw, file)
    packing = _packing(fields)
    if packing not in FORMATS:
        what = next((what for name, what in OTHERS.items() if re.fullmatch(name, packing)), "AutoRound's own packing")
        known = "auto_round:auto_gptq and auto_round:gptqmodel"
        stated = brief(raw.get("packing_format") or raw.get("backend"))
        return CheckpointError(
            f"packing_format is {stated}, {what}; graftq reads AutoRound's {known}, the package auto-round all",
            file=file,
        )
    for key in ("rotation_config", "spinquant_config", "transform_config", "hadamard_config"):
        if raw.get(key):
            return CheckpointError(f"{key}: activations are rotated between layers; not GPTQ's format", file=file)
    whole = [Fields(raw, file), *(Fields(own, file, within(key)) for key, own in _quantized(raw, file).items())]
    return next((why for one in whole if (why := _foreign(one))), None)


def as_gptq(raw: Mapping[str, Any], file: str) -> dict[str, Any]:
    """The parameters that hold for every module, as GPTQ's.

    Raises:
        CheckpointError: as :func:`refusal`, or with it.
    """
    if why := refusal(raw, file):
        raise why
    kept = {key: raw[key] for key in ("bits", "group_size", "sym", "desc_act", "dynamic") if key in raw}
    return {**kept, "quant_method": "gptq", "checkpoint_format": FORMATS[_packing(Fields(raw, file))]}


@dataclass(frozen=True)
class ModuleOverrides:
    """What ``extra_config`` says of single modules.

    Attributes:
        overrides: By key, in the order of the file; nothing where a module is not quantized.
        file: Where it stands, for messages.
    """

    overrides: Mapping[str, Mapping[str, Any]]
    file: str
    _bare: Mapping[str, str] = field(init=False, repr=False, compare=False)
    _searched: tuple[str, ...] = field(init=False, repr=False, compare=False)
    _rules: Rules = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        keys: dict[str, list[str]] = {}
        searched = []
        for key in self.overrides:
            is_name = re.fullmatch(r"[\w.-]+", key) is not None
            if is_name:
                keys.setdefault(_bare(key), []).append(key)
            if not is_name or not re.search(r"(^|\.)\d+(\.|$)", key):  # with a number, it can be one module's alone
                searched.append(key)
        object.__setattr__(self, "_bare", {bare: found[0] for bare, found in keys.items() if len(found) == 1})
        object.__setattr__(self, "_searched", tuple(searched))
        rules = Rules([f".*(?:{key})" for key in searched], self.file, "extra_config")
        object.__setattr__(self, "_rules", rules)

    @classmethod
    def read(cls, raw: Mapping[str, Any], file: str) -> ModuleOverrides | None:
        """From AutoRound's parameters; None if it says nothing of single modules.

        Raises:
            CheckpointError: if a key is no regular expression, or what it stands for is no object.
        """
        quantized = _quantized(raw, file)
        keys = raw.get("extra_config") or {}
        return cls({key: quantized.get(key, {}) for key in keys}, file) if keys else None

    def find(self, name: str) -> tuple[str, Mapping[str, Any]] | None:
        """The key that counts for a module, and what it overrides.

        Raises:
            CheckpointError: if a key takes too long to match.
        """
        key = name if name in self.overrides else self._bare.get(_bare(name))
        if key is None:
            number = self._rules.find(name)
            key = None if number is None else self._searched[number]
        return None if key is None else (key, self.overrides[key])


def _packing(fields: Fields) -> str:
    """What follows ``auto_round:``, without the name of a kernel; AutoRound's default is GPTQ's."""
    stated = fields.word("packing_format")
    if stated is None and (old := fields.word("backend")) and old.startswith("auto_round"):
        stated = old
    if stated in (None, "auto"):
        return "auto_gptq"
    parts = stated.split(":")
    return parts[1] if parts[0] == "auto_round" and len(parts) > 1 else stated


def _quantized(raw: Mapping[str, Any], file: str) -> dict[str, Mapping[str, Any]]:
    """The entries of ``extra_config`` that are of quantized modules."""
    extra = raw.get("extra_config")
    if not extra and (extra is None or isinstance(extra, Mapping)):
        return {}
    if not isinstance(extra, Mapping):
        raise CheckpointError(f"extra_config is a {type(extra).__name__}, not an object", file=file)
    found = {}
    for key, own in extra.items():
        if not isinstance(own, Mapping):
            raise CheckpointError(f"{within(key)}overrides nothing", file=file)
        bits = Fields(own, file, within(key)).integer("bits")
        if bits is None or bits < UNQUANTIZED:
            found[key] = own
    return found


def _foreign(fields: Fields) -> CheckpointError | None:
    """Why what is said of a module, or of all, is not GPTQ's."""
    words = (fields.word("data_type") or "int").split("_")
    if "int" not in words or {"mx", "dq"}.intersection(words):
        return fields.fail("data_type", ", not GPTQ's integers")
    bits = fields.integer("act_bits")
    if bits is not None and bits < UNQUANTIZED:
        return fields.fail("act_bits", ": activations are quantized, too; not GPTQ's format")
    for key in ("super_bits", "super_group_size"):
        if fields.raw.get(key) is not None:
            return fields.fail(key, ": scales are quantized, too; not GPTQ's format")
    return None


def within(key: str) -> str:
    """What messages put in front of a parameter of one key."""
    return f"extra_config {brief(key)}: "


def _bare(name: str) -> str:
    """A name without the parts that a model adds around its layers."""
    parts = name.split(".")
    return ".".join(part for part in parts[:-1] if part not in WRAPPERS) + f".{parts[-1]}"
