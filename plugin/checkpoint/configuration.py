"""Reading the quantization parameters, from ``config.json`` and from ``quantize_config.json``.

Both hold the same keys; a checkpoint has one, the other, or both. There is one order: ``quantization_config`` in
``config.json`` counts, as it does for transformers, vLLM and text-generation-inference; ``quantize_config.json`` counts
where that is absent. Where both are there, both must be sound, and neither may contradict the other in what the tensors
cannot show. Sources: AutoGPTQ's ``BaseQuantizeConfig``, GPTQModel's ``QuantizeConfig`` (``dynamic``,
``checkpoint_format``); ``auto_round`` for AutoRound's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from graftq.plugin.checkpoint import auto_round
from graftq.plugin.checkpoint.fields import Fields, brief
from graftq.plugin.checkpoint.json_files import read_object
from graftq.plugin.checkpoint.validation import Declared
from graftq.quant_linear.errors import CheckpointError
from graftq.quant_linear.spec import SUPPORTED_BITS

if TYPE_CHECKING:
    from graftq.plugin.checkpoint.rules import Rules
    from graftq.plugin.checkpoint.source import Source

CONFIG = "config.json"
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
        rules: The patterns of ``dynamic``; None if there are none.
        beside: The parameters in the other file, which do not count, but must not contradict.
        method: "gptq", or "auto-round" where AutoRound's parameters describe GPTQ's tensors.
        by_module: AutoRound's per-module overrides, which count before ``dynamic``.
    """

    declared: Declared
    dynamic: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    weight_names: tuple[str, ...] = ()
    source: str = ""
    rules: Rules | None = field(default=None, compare=False)
    beside: QuantConfig | None = None
    method: str = "gptq"
    by_module: auto_round.ModuleOverrides | None = None

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str) -> QuantConfig:
        """Validate the parameters as found in ``source``.

        Raises:
            CheckpointError: for another method or format than GPTQ's, and for values out of range.
        """
        method = read_method(raw, source)
        by_module = None
        if method == auto_round.METHOD:
            by_module = auto_round.ModuleOverrides.read(raw, source)
            for key, overrides in by_module.overrides.items() if by_module else ():
                _overridden(Declared(), Fields(overrides, source, auto_round.within(key)))
            raw = auto_round.as_gptq(raw, source)
        elif method != "gptq":
            raise CheckpointError(f"quant_method is {brief(method)}, not 'gptq'", file=source)
        fields = Fields(raw, source)
        zero_offset = ZERO_OFFSETS[_format(fields)]
        if raw.get("rotation"):  # GPTQModel's: the layers before have been rotated, down_proj's inputs are at run time
            raise fields.fail("rotation", ": inputs are to be rotated at run time; not GPTQ's format")
        declared = replace(_overridden(Declared(), fields), zero_offset=zero_offset)
        if declared.bits is None:
            raise CheckpointError("bits missing", file=source)
        dynamic, rules = _dynamic(raw.get("dynamic"), source)
        stems = [fields.file_stem(key) for key in ("model_file_base_name", "model_basename")]
        group_size = -1 if declared.group_size is None else declared.group_size
        stems.append(autogptq_stem(declared.bits, group_size))
        names = tuple(dict.fromkeys(stem for stem in stems if stem))
        return cls(declared, dynamic, names, source, rules, method=method, by_module=by_module)

    @classmethod
    def from_files(cls, written: Mapping[str, Mapping[str, Any]], source: Source) -> QuantConfig:
        """The parameters of a checkpoint from all that its files state.

        Args:
            written: From :func:`read_written`; not empty.
            source: The checkpoint.

        Raises:
            CheckpointError: as :meth:`from_dict` for either file, or if they contradict each other about the format.
        """
        first, *others = (cls.from_dict(raw, source.describe(name)) for name, raw in written.items())
        for beside in others:
            first = first.with_beside(beside)
        return first

    def with_beside(self, other: QuantConfig) -> QuantConfig:
        """These parameters, held against those of another file.

        Raises:
            CheckpointError: if the formats differ: where zero points vary, no tensor shows which is right.
        """
        if self.format != other.format:
            reason = (
                f"checkpoint_format is {self.format!r}, but {other.format!r} in {other.source} (without one, 'gptq')"
            )
            raise CheckpointError(reason, file=self.source)
        names = tuple(dict.fromkeys((*other.weight_names, *self.weight_names)))  # AutoGPTQ names files in its own
        return replace(self, beside=other, weight_names=names)

    @property
    def format(self) -> str:
        """The name of the format in ``checkpoint_format``."""
        return next(name for name, offset in ZERO_OFFSETS.items() if offset == self.declared.zero_offset)

    def for_module(self, name: str) -> Declared:
        """What is declared for the module of that name in the checkpoint, per-module overrides included.

        Raises:
            CheckpointError: if a pattern of theirs takes too long to match.
        """
        declared = self.declared
        number = self.rules.find(name) if self.rules else None
        if self.rules and number is not None:
            pattern = self.rules.patterns[number]
            declared = _overridden(declared, Fields(self.dynamic[pattern], self.source, _within(pattern)))
        if self.by_module and (found := self.by_module.find(name)):
            key, overrides = found
            declared = _overridden(declared, Fields(overrides, self.source, auto_round.within(key)))
        if self.beside is not None:
            other = self.beside.for_module(name).desc_act
            if other != declared.desc_act:
                disputed = f"desc_act is {declared.desc_act} in {self.source}, but {other} in {self.beside.source}"
                declared = replace(declared, disputed_order=disputed)
        return declared


def read_method(raw: Mapping[str, Any], source: str) -> str:
    """The quantization method that parameters name, in lower case; "gptq" if they name none, one name for AutoRound.

    bitsandbytes' switches come before any name, as they do in transformers.

    Raises:
        CheckpointError: if it is no string.
    """
    fields = Fields(raw, source)
    named = [method for key in ("quant_method", "method") if (method := fields.word(key))]
    if raw.get("load_in_4bit") or raw.get("load_in_8bit"):
        return "bitsandbytes"
    method = named[0] if named else "gptq"
    return auto_round.METHOD if method in auto_round.SPELLINGS else method


def read_written(
    source: Source, given: Mapping[str, Any] | None = None, name: str = QUANTIZE_CONFIG
) -> dict[str, Mapping[str, Any]]:
    """What a checkpoint states of its quantization, by file, the one that counts first; an empty object is nothing.

    Args:
        source: The checkpoint.
        given: What stands for the parameters in ``config.json``, if the caller has them already.
        name: The other file.

    Raises:
        CheckpointError: if a file is damaged.
    """
    path = source.fetch(CONFIG) if given is None else source.cached(CONFIG)
    config = read_object(path, source.describe(CONFIG)) if path else {}
    parameters: Any = given if given is not None else stated_in(config)
    path = source.fetch(name)
    beside = read_object(path, source.describe(name)) if path else None
    if parameters is not None and not isinstance(parameters, Mapping):
        kind = type(parameters).__name__
        raise CheckpointError(f"quantization_config is a {kind}, not an object", file=source.describe(CONFIG))
    return {file: raw for file, raw in ((CONFIG, parameters), (name, beside)) if raw}


def stated_in(config: Mapping[str, Any]) -> Any:
    """The quantization parameters in a model's configuration, or in that of its language model; None without any."""
    text = config.get("text_config")
    for holder in (config, text if isinstance(text, Mapping) else {}):
        if holder.get("quantization_config") is not None:
            return holder["quantization_config"]
    return None


def autogptq_stem(bits: int, group_size: int) -> str:
    """What AutoGPTQ calls a weight file, without ending."""
    return f"gptq_model-{bits}bit-{group_size}g"


def _overridden(base: Declared, fields: Fields) -> Declared:
    """``base``, with what the parameters state instead."""
    desc_act, sym = fields.boolean("desc_act"), fields.boolean("sym")
    bits, group_size = fields.integer("bits", SUPPORTED_BITS), fields.integer("group_size")
    if group_size is not None and group_size != -1 and group_size <= 0:
        raise fields.fail("group_size", "; it must be positive, or -1 for one group")
    return replace(
        base,
        bits=base.bits if bits is None else bits,
        group_size=base.group_size if group_size is None else group_size,
        desc_act=base.desc_act if desc_act is None else desc_act,
        sym=base.sym if sym is None else sym,
    )


def _format(fields: Fields) -> str:
    names = {name for key in ("checkpoint_format", "format") if (name := fields.word(key))}
    if fields.boolean("is_marlin_format"):
        names.add("marlin")
    if len(names) > 1:
        formats = " and ".join(map(brief, sorted(names)))
        raise CheckpointError(f"contradictory formats: {formats}", file=fields.file)
    name = next(iter(names), "gptq")
    if name not in ZERO_OFFSETS:
        known = " and ".join(ZERO_OFFSETS)
        what = ", GPTQModel's planar packing for 5 to 7 bits, codes split into bit planes" if name == "gptq_p" else ""
        raise CheckpointError(f"checkpoint_format is {brief(name)}{what}; graftq reads {known}", file=fields.file)
    return name


def _dynamic(dynamic: Any, source: str) -> tuple[Mapping[str, Mapping[str, Any]], Rules | None]:
    if not dynamic and (dynamic is None or isinstance(dynamic, Mapping)):
        return {}, None
    if not isinstance(dynamic, Mapping):
        raise CheckpointError(f"dynamic is a {type(dynamic).__name__}, not an object", file=source)
    from graftq.plugin.checkpoint.rules import Rules

    rules = Rules(list(dynamic), source)
    for pattern, overrides in dynamic.items():
        if not isinstance(overrides, Mapping):
            raise CheckpointError(f"{_within(pattern)}overrides nothing", file=source)
        _overridden(Declared(), Fields(overrides, source, _within(pattern)))
    return dynamic, rules


def _within(pattern: str) -> str:
    return f"dynamic rule {brief(pattern)}: "
