"""What ``graftq inspect`` prints of an inspection."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from graftq.plugin.checkpoint import oddities
from graftq.plugin.checkpoint.inspection import Inspection, human
from graftq.plugin.cli import machine

if TYPE_CHECKING:
    from graftq.plugin.checkpoint.configuration import QuantConfig
    from graftq.plugin.checkpoint.projections import InspectedProjection
    from graftq.quant_linear.spec import QuantSpec


def report(found: Inspection) -> Iterator[str]:
    """The report, line by line."""
    declared = found.config.declared
    packed = {info.name: info for one in found.seen.values() for info in one.infos.values()}
    size = sum(info.nbytes for info in found.index.tensors.values())
    part = sum(info.nbytes for info in packed.values())
    specs = [one.spec for one in found.seen.values() if one.spec is not None]
    count = sum(spec.in_features * spec.out_features for spec in specs)
    yield found.source.describe("").rstrip("/")
    yield f"  parameters   {', '.join(found.raw)}: {_parameters(found.config)}"
    yield f"  weights      {found.weights}: {human(size)}, of which quantized {human(part)}"
    yield f"  quantized    {len(found.seen)} modules, {count:,} weights, {8 * part / max(count, 1):.2f} bits each"
    yield f"  act-order    {_tally([spec.desc_act for spec in specs], found.unread, declared.desc_act)}"
    yield f"  symmetric    {_tally([spec.sym for spec in specs], found.unread, declared.sym)}"
    yield f"Modules, and the kernel each would get on {machine.device()} in {found.dtype}"
    for (kind, spec), number in sorted(_kinds(found.seen).items(), key=lambda item: item[0][0]):
        yield f"  {number:>5} x {kind}: {_describe(spec)} -> {machine.kernel(spec, found.dtype)}"
    yield "Traps"
    yield from [f"  {trap}" for trap in oddities.find(found)] or ["  none"]
    if found.errors:
        yield "Errors: this checkpoint will not load"
        yield from (f"  {error}" for error in found.errors[:10])
        if len(found.errors) > 10:
            yield f"  and {len(found.errors) - 10} more"


def _parameters(config: QuantConfig) -> str:
    """The declared parameters in one line."""
    declared = config.declared
    symmetric = {True: "symmetric", False: "asymmetric", None: "symmetry not stated"}[declared.sym]
    group = "not stated" if declared.group_size is None else declared.group_size
    order = "act-order" if declared.desc_act else "no act-order"
    return f"{declared.bits} bits, group {group}, {order}, {symmetric}, format {config.format}"


def _describe(spec: QuantSpec) -> str:
    order = "act-order" if spec.desc_act else "in order"
    symmetry = "symmetric" if spec.sym else "asymmetric"
    bias = ", bias" if spec.has_bias else ""
    groups = "one group" if spec.num_groups == 1 else f"{spec.num_groups} groups of {spec.group_size}"
    return f"{spec.in_features} -> {spec.out_features}, {spec.bits} bits, {groups}, {order}, {symmetry}{bias}"


def _kinds(seen: Mapping[str, InspectedProjection]) -> Counter[tuple[str, QuantSpec]]:
    """How many projections there are of each kind: a name without its numbers, and a spec."""
    return Counter((re.sub(r"\b\d+\b", "*", one.stored), one.spec) for one in seen.values() if one.spec is not None)


def _tally(answers: list[bool], unread: str, declared: bool | None) -> str:
    if unread:
        said = {True: "yes", False: "no", None: "not stated"}[declared]
        return f"{said}, as declared; the values were not read: {unread}"
    number = sum(answers)
    word = "yes" if answers and number == len(answers) else "no" if not number else "partly"
    return f"{word}, seen in {number} of {len(answers)} modules"
