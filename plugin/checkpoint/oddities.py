"""What is unusual about a checkpoint, and has made other loaders fail or, worse, succeed with garbage.

Each answers for one row of the table in docs/format.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from graftq.plugin.checkpoint import auto_round
from graftq.plugin.checkpoint.configuration import QUANTIZE_CONFIG

if TYPE_CHECKING:
    from graftq.plugin.checkpoint.inspection import Inspection

COMPARED = ("bits", "group_size", "desc_act", "sym")


def find(found: Inspection) -> Iterator[str]:
    """One sentence for each trap; none of these keeps graftq from loading the checkpoint."""
    yield from _files(found)
    yield from _parameters(found)
    yield from _names(found)
    yield from _shapes(found)
    if not found.unread:
        yield from _values(found)


def _files(found: Inspection) -> Iterator[str]:
    if "config.json" not in found.raw:
        yield f"the parameters are in {QUANTIZE_CONFIG} alone"
    if found.weights not in ("model.safetensors", "model.safetensors.index.json"):
        yield f"the weights are called {found.weights}"
    if len(found.raw) == 2:
        ours, theirs = found.raw.values()
        for key in COMPARED:
            if key in ours and key in theirs and ours[key] != theirs[key]:
                yield f"{key} is {ours[key]} in config.json, but {theirs[key]} in {QUANTIZE_CONFIG}; config.json counts"


def _parameters(found: Inspection) -> Iterator[str]:
    raw = found.raw[next(iter(found.raw))]
    if found.config.method == auto_round.METHOD:
        yield f"the parameters are AutoRound's, and the packing is that of format {found.config.format}"
    if found.config.by_module:
        yield f"extra_config has {len(found.config.by_module.overrides)} entries that override parameters by module"
    if raw.get("activation"):
        yield "activation: made for quantized activations; graftq leaves these as they are"
    if found.config.declared.zero_offset == 0:
        yield "format gptq_v2: zero points are stored as they are, not less one"
    if "desc_act" not in raw and found.config.method == "gptq":
        yield "desc_act is not stated"
    if found.config.dynamic:
        yield f"{len(found.config.dynamic)} dynamic rules override parameters by module"
    shown = {(one.spec.bits, one.spec.group_size) for one in found.seen.values() if one.spec}
    if len({bits for bits, _ in shown}) > 1:
        yield f"modules differ in bits: {', '.join(map(str, sorted({bits for bits, _ in shown})))}"
    listed = raw.get("modules_in_block_to_quantize")
    groups = [[group] if isinstance(group, str) else group for group in listed] if isinstance(listed, list) else []
    if groups and all(isinstance(group, list) for group in groups):
        names = [name for group in groups for name in group]
        if unlisted := [name for name in found.seen if not any(name.endswith(f".{listed}") for listed in names)]:
            yield f"modules_in_block_to_quantize does not name {_some(unlisted)}"


def _names(found: Inspection) -> Iterator[str]:
    if old := [name for name in found.seen if re.search(r"\.experts\.\d+\.w[123]$", name)]:
        yield f"experts bear the names of transformers 4: {_some(old)}"
    if heads := [name for name in found.seen if re.search(r"(^|\.)lm_head$", name)]:
        yield f"the output embedding is quantized: {_some(heads)}"
    if gates := [name for name in found.seen if re.search(r"\.(gate|router)$", name)]:
        yield f"routers are quantized: {_some(gates)}"


def _shapes(found: Inspection) -> Iterator[str]:
    specs = {name: one.spec for name, one in found.seen.items() if one.spec is not None}
    if padded := [name for name, spec in specs.items() if spec.padded_in != spec.in_features]:
        yield f"rows are padded: {_some(padded)}"
    if ragged := [name for name, spec in specs.items() if spec.in_features % 32 or spec.out_features % 32]:
        yield f"sizes are no multiple of 32: {_some(ragged)}"
    if partial := [name for name, spec in specs.items() if spec.in_features % spec.group_size]:
        yield f"the last group is not full: {_some(partial)}"
    if absent := [name for name, one in found.seen.items() if one.g_idx == "absent"]:
        yield f"g_idx is missing: {_some(absent)}"
    dtypes = {one.infos["scales"].dtype for one in found.seen.values() if one.spec} - {"F16"}
    if dtypes:
        yield f"scales are stored as {' and '.join(sorted(dtypes))}"


def _values(found: Inspection) -> Iterator[str]:
    states: dict[str, list[str]] = {}
    for name, one in found.seen.items():
        states.setdefault(one.g_idx, []).append(name)
    if "all zero" in states:
        yield f"g_idx is all zeros, and means no act-order: {_some(states['all zero'])}"
    claims = {name: found.config.for_module(name).desc_act for name in found.seen}
    several = {name for name, one in found.seen.items() if one.spec and one.spec.num_groups > 1}
    if idle := [name for name in states.get("in order", ()) if claims[name] and name in several]:
        yield f"desc_act is true, but g_idx is in order: {_some(idle)}"
    if silent := [name for name in states.get("unordered", ()) if not claims[name]]:
        yield f"desc_act is false, but g_idx is unordered: {_some(silent)}"
    if zeros := [name for name, one in found.seen.items() if one.idle_bias]:
        yield f"biases of zeros: {_some(zeros)}"
    if found.config.declared.zero_offset and (high := [name for name, one in found.seen.items() if one.highest_zero]):
        yield f"stored zero points reach the highest code, and mean one more: {_some(high)}"


def _some(names: list[str]) -> str:
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]
