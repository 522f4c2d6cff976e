"""Patterns of ``dynamic`` match as ``re`` says, and never take forever."""

from __future__ import annotations

import pickle
import random
import re
import time

import pytest

from graftq.plugin.checkpoint.rules import Rules
from graftq.quant_linear.errors import CheckpointError

NAMES = [
    "lm_head",
    "model.layers.1.self_attn.q_proj",
    "model.layers.11.mlp.gate",
    "model.layers.11.mlp.experts.3.down_proj",
    "model.layers.2.mlp.shared_expert_gate\n",
]
PATTERNS = [
    r".*experts.*",
    r"^model\.layers\.\d+\.mlp\..*$",
    r"^(?!.*mlp\.gate).*",
    r".*\.(?:1|11)\..*(?:q|k|v)_proj",
    r"(?:\w+\.)+down_proj\b",
    r"(?i)MODEL\.layers\.[0-9]{2,}\.",
    r".*(?<=layers\.)1\.",
    r"[^.]+$",
    r"(?:model\.)?lm_head\Z",
    r"",
    r"(?x) .* gate # the router",
]


@pytest.mark.parametrize("prefix", ["", "+:", "-:"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_like_re(pattern: str, prefix: str) -> None:
    found = [Rules([prefix + pattern], "f").find(name) is not None for name in NAMES]
    assert found == [re.match(pattern, name) is not None for name in NAMES]


def random_pattern(rng: random.Random, depth: int) -> str:
    atoms = ["a", "b", r"\.", r"\d", r"\w", ".", "[ab]", "[^a]", r"\b", "^", "$", r"\Z", "(?i:A)", r"(?<=a)"]
    if depth == 0 or rng.random() < 0.4:
        return rng.choice(atoms)
    inner, other = random_pattern(rng, depth - 1), random_pattern(rng, depth - 1)
    repeated = [f"(?:{inner}){times}" for times in ("*", "+", "?", "{2}", "{1,3}", "*?", "{0}")]
    return rng.choice([inner + other, f"(?:{inner}|{other})", f"(?={inner})", f"(?!{inner})", *repeated])


def test_like_re_at_random() -> None:
    rng = random.Random(0)
    compared = 0
    for _ in range(600):
        pattern = random_pattern(rng, 4)
        try:
            rules = Rules([pattern], "f")
        except CheckpointError:  # a repetition of a repetition
            continue
        for _ in range(10):
            name = "".join(rng.choice("ab1.A\n") for _ in range(rng.randint(1, 7)))
            assert (rules.find(name) is not None) == (re.match(pattern, name) is not None), (pattern, name)
            compared += 1
    assert compared > 4000


def test_the_first_that_matches() -> None:
    rules = Rules([r"-:.*gate$", r".*\.1\.", r".*"], "f")
    assert [rules.find(name) for name in ("a.gate", "a.1.b", "x")] == [0, 1, 2]
    assert pickle.loads(pickle.dumps(rules)).find("a.1.b") == 1


@pytest.mark.parametrize(
    "pattern", [r".*" * 30 + "!", r"(?:.*a)*!", r"(?:a|a.|.a)*!", "(?:a?){300}a{300}!", r"(?:(?=.*!)\w|\W)*!"]
)
def test_slow_for_re_but_not_here(pattern: str) -> None:
    began = time.perf_counter()
    assert Rules([pattern], "f").find("model.layers.0." + "a" * 100) is None
    assert time.perf_counter() - began < 5


REFUSED = {
    "^(([a-z_.0-9]+)+)+!$": "repeats a repetition",
    "(.*)*": "repeats a repetition",
    r"(\w+\s?)*!": "repeats a repetition",
    r"(a)\1": "uses groupref",
    "(": "is not a regular expression",
    "a{99999999999}": "is not a regular expression",
    "(" * 4000 + ")" * 4000: "nested too deeply",
    "a{60000}": "needs more than 10000 states",
    "(?:a{200}b){200}": "needs more than 10000 states",
    "a" * 20_000: "is longer than 10000 characters",
}


@pytest.mark.parametrize("pattern", REFUSED, ids=lambda pattern: pattern[:20])
def test_refused_by_name(pattern: str) -> None:
    with pytest.raises(CheckpointError, match=f"f: dynamic rule .*{REFUSED[pattern]}"):
        Rules([pattern], "f")


RULE_FOR_EVERY_MODULE = {
    "escaped": r"+:^model\.layers\.{layer}\.mlp\.experts\.{expert}\.w1$",
    "anywhere": r"-:.*\.layers\.{layer}\..*experts\.{expert}\.w1.*",
    "as written": "model.layers.{layer}.mlp.experts.{expert}.w1",
}


@pytest.mark.parametrize("form", RULE_FOR_EVERY_MODULE)
def test_a_rule_for_every_module_is_fast(form: str) -> None:
    places = [(number // 8, number % 8) for number in range(1000)]
    began = time.process_time()
    rules = Rules([RULE_FOR_EVERY_MODULE[form].format(layer=layer, expert=expert) for layer, expert in places], "f")
    found = [rules.find(f"model.layers.{layer}.mlp.experts.{expert}.w1") for layer, expert in places]
    assert found == list(range(1000))
    assert time.process_time() - began < 5


def test_all_patterns_and_names_share_one_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graftq.plugin.checkpoint.rules.WORK_LIMIT", 2_000_000)
    rules = Rules([".*" * (3 + number % 40) + f"[{chr(0x100 + number)}!]" for number in range(100)], "f")
    found = (rules.find(f"model.layers.{number}.mlp.up_proj") for number in range(100_000))
    with pytest.raises(CheckpointError, match=r"f: dynamic rule '\.\*\.\*.* takes too long to match"):
        any(found)


def test_too_many_patterns_to_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graftq.plugin.checkpoint.rules.WORK_LIMIT", 2_000_000)
    with pytest.raises(CheckpointError, match=r"f: dynamic rule .* and those before it are too many to be read"):
        Rules(["(?:a?){300}a{300}"] * 5000, "f")


def test_a_name_is_matched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graftq.plugin.checkpoint.rules.WORK_LIMIT", 20_000)
    rules = Rules([".*[0-9]+[!?]"], "f")
    for _ in range(1000):
        assert rules.find("model.layers.0.mlp.up_proj") is None
