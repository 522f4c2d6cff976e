"""Matching module names against the patterns of ``dynamic`` in bounded time.

Patterns come from a checkpoint, and Python's ``re`` tries every way to match one: ``^((a+)+)+!$`` takes hours for a
name of forty letters, during which nothing can interrupt it, as it neither returns to the interpreter nor ends with its
thread. To forbid patterns by their looks is not enough (``.*.*.*.*.*!`` is slow, too), and a process to be killed is
much to start in somebody else's program. So patterns are parsed by ``re``, but matched by an automaton
(:mod:`~graftq.plugin.checkpoint.automaton`). One budget of work covers reading and matching all of them.

Some checkpoints have a pattern for every module. Most of these need not be tried for a name, as they hold letters that
the name does not.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from graftq.plugin.checkpoint.automaton import (
    SIZE_LIMIT,
    Budget,
    Exhausted,
    Program,
    Unsupported,
    positions_of,
    sre_parse,
)
from graftq.plugin.checkpoint.fields import brief
from graftq.quant_linear.errors import CheckpointError

WORK_LIMIT = 40_000_000
"""Steps that reading all patterns of a checkpoint and matching all names may take together: some seconds."""

PARSING_COST = 30
"""Steps that stand for parsing one character of a pattern."""

TRYING_COST = 3
"""Steps that stand for finding out that a pattern needs letters which a name has not."""


class Rules:
    """The patterns of one checkpoint, in their order.

    Args:
        patterns: As written, with or without ``+:`` or ``-:`` in front.
        file: The file they come from, for messages.
        what: What one of them is called in messages.

    Raises:
        CheckpointError: if one is no regular expression, or cannot be matched in bounded time.
    """

    def __init__(self, patterns: Sequence[str], file: str, what: str = "dynamic rule"):
        self.patterns = tuple(patterns)
        self.file = file
        self.what = what
        self._budget = Budget(WORK_LIMIT)
        self._programs: list[Program] = []
        self._texts: list[list[str]] = []
        self._by_text: defaultdict[str, list[int]] = defaultdict(list)
        self._positions: dict[Any, int] = {}
        self._found: dict[str, int | None] = {}
        characters: dict[Any, re.Pattern[str]] = {}
        for pattern in self.patterns:
            program, texts = self._compile(pattern, characters)
            self._programs.append(program)
            self._texts.append(texts)
        shared = Counter(text for texts in self._texts for text in texts)
        for number, texts in enumerate(self._texts):
            rarest = min(texts, key=lambda text: (shared[text], -len(text)), default="")
            self._by_text[rarest].append(number)
        self._lengths = sorted({len(text) for text in self._by_text})

    def __reduce__(self) -> tuple[Any, ...]:
        return Rules, (self.patterns, self.file, self.what)

    def find(self, name: str) -> int | None:
        """The number of the first pattern that matches from the beginning of ``name``.

        Raises:
            CheckpointError: if matching takes too long.
        """
        if name not in self._found:
            self._found[name] = self._match(name)
        return self._found[name]

    def _match(self, name: str) -> int | None:
        positions = positions_of(name, self._positions)
        for number in sorted(self._candidates(name)):
            try:
                self._budget.spend(TRYING_COST)
                if all(text in name for text in self._texts[number]) and self._programs[number].matches(
                    name, positions
                ):
                    return number
            except Exhausted:
                raise self._fail(self.patterns[number], "takes too long to match") from None
        return None

    def _candidates(self, name: str) -> Iterator[int]:
        """The patterns whose rarest needed text is part of ``name``, found by looking its parts up."""
        for length in self._lengths:
            for text in {name[start : start + length] for start in range(len(name) - length + 1)}:
                yield from self._by_text.get(text, ())

    def _compile(self, pattern: str, characters: dict[Any, re.Pattern[str]]) -> tuple[Program, list[str]]:
        expression = re.sub(r"^[+-]:", "", pattern)
        if len(expression) > SIZE_LIMIT:
            raise self._fail(pattern, f"is longer than {SIZE_LIMIT} characters")
        try:
            self._budget.spend(PARSING_COST * len(expression))
            parsed = sre_parse.parse(expression)
            flags = parsed.state.flags
            return Program(parsed, flags, self._budget, characters), _needed_texts(parsed, flags)
        except Exhausted:
            raise self._fail(pattern, "and those before it are too many to be read") from None
        except Unsupported as error:
            raise self._fail(pattern, str(error)) from error
        except (re.error, OverflowError, RecursionError, ValueError) as error:
            why = "nested too deeply" if isinstance(error, RecursionError) else error
            raise self._fail(pattern, f"is not a regular expression: {why}") from error

    def _fail(self, pattern: str, why: str) -> CheckpointError:
        return CheckpointError(f"{self.what} {brief(pattern)} {why}", file=self.file)


def _needed_texts(items: Iterable[Any], flags: int) -> list[str]:
    """Texts that are part of every name that a parsed expression matches."""
    texts = [""]
    for operation, argument in items:
        kind = str(operation)
        if kind == "LITERAL" and not flags & re.IGNORECASE:
            texts[-1] += chr(argument)
        elif kind == "SUBPATTERN":
            _, added, removed, inner = argument
            texts += [*_needed_texts(inner, (flags | added) & ~removed), ""]
        elif kind in ("MAX_REPEAT", "MIN_REPEAT") and argument[0]:
            texts += [*_needed_texts(argument[2], flags), ""]
        elif kind != "AT":
            texts.append("")
    return [text for text in dict.fromkeys(texts) if text]
