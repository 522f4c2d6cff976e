"""GPTQModel's rules for single modules: patterns and what they override."""

from __future__ import annotations

import random
from typing import Any

from fuzz.checkpoint import Checkpoint
from fuzz.registry import mutation
from fuzz.values import HOSTILE, hostile

BACKTRACKING = (
    "^(([a-z_.0-9]+)+)+!$",
    "(a|a|[a-z_.0-9])*!",
    "(.*)*!",
    r"^(?:model\.)?(\w+\.?)+\s$",
    r"+:(?:[a-z]+\.?[0-9]*)+Z",
    r"-:((\w|\.)*)*#",
    ".*.*.*.*.*.*.*.*.*.*.*.*.*!",
)
BROKEN = ("(", "[", "*", "(?P<x", "(?<=a*)b", "a{2,1}", "\\", "(?z)", "+:(", "-:[", "(?P=x)", "a**", "\x1b[", "[\n")
HUGE = (
    "a{99999999999}",
    "a{4294967295}",
    "(" * 2000 + ")" * 2000,
    "(" * 100_000,
    "a" * 1_000_000,
    "(?:" * 500 + "x" + ")" * 500,
)
ODD = (
    "",
    "-:",
    "+:",
    "-",
    ".",
    "-:.*",
    "+:.*",
    "-:.*norm.*",
    "(?i)MODEL",
    "\0",
    "\x1b[31m",
    "\ud800",
    "^$",
    "$",
    "\n",
    "-:+:x",
)


def _rules(checkpoint: Checkpoint, rules: Any) -> None:
    for parameters in checkpoint.parameters():
        parameters["dynamic"] = rules


@mutation("dynamic")
def backtracking(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "base"
    _rules(checkpoint, {generator.choice(BACKTRACKING): {"bits": checkpoint.bits}})


@mutation("dynamic")
def broken(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "base"
    _rules(checkpoint, {generator.choice(BROKEN): {"bits": checkpoint.bits}})


@mutation("dynamic")
def huge(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "base"
    _rules(checkpoint, {generator.choice(HUGE): {"bits": checkpoint.bits}})


@mutation("dynamic")
def odd(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "base"
    _rules(checkpoint, {generator.choice(ODD): generator.choice([{}, {"bits": checkpoint.bits}])})


@mutation("dynamic")
def hostile_override(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "base"
    field = generator.choice(["bits", "group_size", "desc_act", "sym", "checkpoint_format", "format", "lm_head", "x"])
    _rules(checkpoint, {generator.choice([".*", ".*q_proj.*", "+:.*1.*", "x"]): {field: hostile(generator)}})


@mutation("dynamic")
def bits_as_text(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "base"
    _rules(checkpoint, {".*": {"bits": str(checkpoint.bits), "group_size": str(checkpoint.group_size)}})


@mutation("dynamic")
def null_overrides(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "base"
    names = generator.sample(["bits", "group_size", "desc_act", "sym"], 2)
    _rules(checkpoint, {".*": dict.fromkeys(names)})


@mutation("dynamic")
def wrong_override(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "base"
    override = generator.choice(
        [{"bits": 2}, {"bits": 8}, {"group_size": 64}, {"group_size": -1}, {"bits": 5}, {"sym": False}]
    )
    _rules(checkpoint, {".*": override})


@mutation("dynamic")
def no_object(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "base"
    _rules(checkpoint, generator.choice([*HOSTILE, [[".*", {}]], {".*": []}, {".*": None}, {".*": 4}, {".*": "x"}]))


@mutation("dynamic")
def excluded(checkpoint: Checkpoint, generator: random.Random) -> None:
    """A module that has a ``qweight`` is packed, whatever the rules say."""
    checkpoint.must_load = True
    _rules(checkpoint, {generator.choice(["-:.*q_proj.*", "-:.*norm.*", "-:lm_head"]): {}})


@mutation("dynamic")
def many_rules(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "base"
    _rules(checkpoint, {f"x{number}.*y": {"bits": 4} for number in range(500)})


@mutation("dynamic", bits=4)
def rule_that_holds(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.must_load = True
    for parameters in checkpoint.parameters():
        parameters["bits"] = 8
    _rules(checkpoint, {generator.choice([".*", "+:.*", r"^model\..*"]): {"bits": 4}})
