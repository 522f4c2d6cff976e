"""Matching module names against the patterns of ``dynamic`` in bounded time.

Patterns come from a checkpoint, and Python's ``re`` tries every way to match one: ``^((a+)+)+!$`` takes hours for a
name of forty letters, during which nothing can interrupt it, as it neither returns to the interpreter nor ends with its
thread. To forbid patterns by their looks is not enough (``.*.*.*.*.*!`` is slow, too), and a process to be killed is
much to start in somebody else's program. So patterns are parsed by ``re``, but matched here by following all ways at
once (Thompson, 1968): the time for a name is at most its length times the size of the pattern. Sets of states that were
met before are looked up, which makes this some microseconds for the names of a model. What cannot be matched so
(references to groups, and repetitions that give nothing back) is refused by name.

Refused are also repetitions of a repetition without a literal between two of them: readers of the same checkpoint that
use ``re`` would hang, and nobody means them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from graftq.plugin.checkpoint.fields import brief
from graftq.quant_linear.errors import CheckpointError

try:
    from re import _compiler as sre_compile  # type: ignore[attr-defined]
    from re import _parser as sre_parse  # type: ignore[attr-defined]
except ImportError:  # Python 3.10
    import sre_compile
    import sre_parse

SIZE_LIMIT = 10_000
"""Characters of a pattern, and states that it is made of once its repetitions are written out."""

WORK_LIMIT = 4_000_000
"""States that may be visited outside of the look-up table by all patterns of a checkpoint: some seconds."""

WORK_PER_RULE = 20_000
"""More of them for every pattern; some checkpoints have one for every module."""

ACCEPT = -1

POSITIONS = {
    "AT_BEGINNING": "^",
    "AT_BEGINNING_STRING": r"\A",
    "AT_END": "$",
    "AT_END_STRING": r"\Z",
    "AT_BOUNDARY": r"\b",
    "AT_NON_BOUNDARY": r"\B",
}
"""What the parser calls the expressions that consume nothing."""

Context = tuple["str | None", "str | None", bool]
"""The characters before and after a position, None at an end, and whether the latter is the name's last."""


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
        budget = _Budget(WORK_LIMIT + WORK_PER_RULE * len(self.patterns))
        self._programs = [self._compile(pattern, budget) for pattern in self.patterns]

    def __reduce__(self) -> tuple[Any, ...]:
        return Rules, (self.patterns, self.file, self.what)

    def find(self, name: str) -> int | None:
        """The number of the first pattern that matches from the beginning of ``name``.

        Raises:
            CheckpointError: if matching takes too long.
        """
        for number, program in enumerate(self._programs):
            try:
                if program.matches(name):
                    return number
            except _Exhausted:
                raise self._fail(self.patterns[number], "takes too long to match") from None
        return None

    def _compile(self, pattern: str, budget: _Budget) -> _Program:
        expression = re.sub(r"^[+-]:", "", pattern)
        if len(expression) > SIZE_LIMIT:
            raise self._fail(pattern, f"is longer than {SIZE_LIMIT} characters")
        try:
            parsed = sre_parse.parse(expression)
            return _Program(parsed, parsed.state.flags, budget)
        except _Unsupported as error:
            raise self._fail(pattern, str(error)) from error
        except (re.error, OverflowError, RecursionError, ValueError) as error:
            why = "nested too deeply" if isinstance(error, RecursionError) else error
            raise self._fail(pattern, f"is not a regular expression: {why}") from error

    def _fail(self, pattern: str, why: str) -> CheckpointError:
        return CheckpointError(f"{self.what} {brief(pattern)} {why}", file=self.file)


class _Unsupported(Exception):
    """A pattern that is not matched here."""


class _Exhausted(Exception):
    """Matching has used up its budget."""


class _Budget:
    def __init__(self, left: int):
        self.left = left

    def spend(self, work: int) -> None:
        self.left -= work
        if self.left < 0:
            raise _Exhausted


class _Program:
    """A nondeterministic automaton: states that consume a character, and states that lead to others without doing so.

    Args:
        parsed: What ``re`` has parsed.
        flags: Those that hold for it.
        budget: Shared by all programs of a checkpoint.
    """

    def __init__(self, parsed: Iterable[Any], flags: int, budget: _Budget):
        self.budget = budget
        self.consuming: dict[int, tuple[re.Pattern[str], int]] = {}
        self.choices: dict[int, tuple[int, ...]] = {}
        self.conditions: dict[int, tuple[Callable[[str, int], bool], int]] = {}
        self.size = 0
        self.looking: set[int] = set()  # states whose condition depends on more than the characters beside a place
        self._characters: dict[tuple[str, int], re.Pattern[str]] = {}
        self._known: dict[tuple[Any, ...], tuple[bool, frozenset[int]]] = {}
        self.start = frozenset((self._sequence(parsed, ACCEPT, flags),))

    def matches(self, name: str, position: int = 0) -> bool:
        """Whether some part of ``name`` that begins at ``position`` matches."""
        current = self.start
        for place in range(position, len(name) + 1):
            key = (current, *_context(name, place))
            if key in self._known:
                accepted, current = self._known[key]
            else:
                reached = self._reach(current, name, place)
                accepted, current = ACCEPT in reached, self._consume(reached, name[place : place + 1])
                if self.looking.isdisjoint(reached):
                    self._known[key] = accepted, current
            if accepted or not current:
                return accepted
        return False

    def _reach(self, current: frozenset[int], name: str, place: int) -> set[int]:
        """The states that follow without a character."""
        reached: set[int] = set()
        pending = list(current)
        while pending:
            state = pending.pop()
            if state in reached:
                continue
            reached.add(state)
            if state in self.choices:
                pending.extend(self.choices[state])
            elif state in self.conditions:
                holds, then = self.conditions[state]
                if holds(name, place):
                    pending.append(then)
        self.budget.spend(len(reached))
        return reached

    def _consume(self, reached: set[int], letter: str) -> frozenset[int]:
        """The states that follow with one more character; none at the end of a name."""
        waiting = [self.consuming[state] for state in reached if letter and state in self.consuming]
        return frozenset(then for accepts, then in waiting if accepts.match(letter))

    def _new(self) -> int:
        self.size += 1
        if self.size > SIZE_LIMIT:
            raise _Unsupported(f"needs more than {SIZE_LIMIT} states")
        return self.size

    def _sequence(self, items: Iterable[Any], then: int, flags: int) -> int:
        """The state in which ``items`` begin; built from their end, so that each knows what follows it."""
        for operation, argument in reversed(list(items)):
            then = self._item(str(operation), operation, argument, then, flags)
        return then

    def _item(self, kind: str, operation: Any, argument: Any, then: int, flags: int) -> int:
        if kind in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
            state = self._new()
            self.consuming[state] = self._character(operation, argument, flags), then
            return state
        if kind == "BRANCH":
            return self._choice([self._sequence(branch, then, flags) for branch in argument[1]])
        if kind == "SUBPATTERN":
            _, added, removed, inner = argument
            return self._sequence(inner, then, (flags | added) & ~removed)
        if kind in ("MAX_REPEAT", "MIN_REPEAT"):
            least, most, inner = argument
            return self._repeat(least, most, inner, then, flags)
        if kind in ("AT", "ASSERT", "ASSERT_NOT"):
            state = self._new()
            if kind == "AT":
                self.conditions[state] = _position(str(argument), flags), then
            else:
                direction, inner = argument
                self.conditions[state] = self._look(kind, direction, inner, flags), then
                self.looking.add(state)
            return state
        if kind == "FAILURE":
            return self._choice([])
        raise _Unsupported(f"uses {kind.lower()}, which is not matched in bounded time")

    def _choice(self, states: list[int]) -> int:
        state = self._new()
        self.choices[state] = tuple(states)
        return state

    def _repeat(self, least: int, most: int, inner: Any, then: int, flags: int) -> int:
        if least > SIZE_LIMIT or (most != sre_parse.MAXREPEAT and most > SIZE_LIMIT):
            raise _Unsupported(f"needs more than {SIZE_LIMIT} states")
        if most > 1 and _varies(inner) and not _has_literal(inner):
            raise _Unsupported("repeats a repetition, which can be matched in exponentially many ways")
        after = then
        if most == sre_parse.MAXREPEAT:
            then = self._choice([])
            self.choices[then] = (self._sequence(inner, then, flags), after)
        else:
            for _ in range(most - least):
                then = self._choice([self._sequence(inner, then, flags), after])
        for _ in range(least):
            self._new()  # a repetition of nothing must not be free
            then = self._sequence(inner, then, flags)
        return then

    def _look(self, kind: str, direction: int, inner: Any, flags: int) -> Callable[[str, int], bool]:
        program = _Program(inner, flags, self.budget)
        self.size += program.size
        self._new()
        back = 0 if direction > 0 else inner.getwidth()[0]  # what is looked back at has one width, says the parser
        wanted = kind == "ASSERT"
        return lambda name, place: (place >= back and program.matches(name, place - back)) == wanted

    def _character(self, operation: Any, argument: Any, flags: int) -> re.Pattern[str]:
        """What ``re`` itself makes of an expression for one character."""
        key = (f"{operation} {argument}", flags)
        if key not in self._characters:
            state = sre_parse.State()
            state.flags = flags
            self._characters[key] = sre_compile.compile(sre_parse.SubPattern(state, [(operation, argument)]), flags)
        return self._characters[key]


def _varies(items: Iterable[Any]) -> bool:
    """Whether an expression holds a repetition of variable length that no literal accompanies."""
    for operation, argument in items:
        kind = str(operation)
        if kind in ("MAX_REPEAT", "MIN_REPEAT"):
            least, most, inner = argument
            if (most > 1 and most > least) or _varies(inner):
                return True
        groups = [argument[3]] if kind == "SUBPATTERN" else argument[1] if kind == "BRANCH" else []
        if any(_varies(group) and not _has_literal(group) for group in groups):
            return True
    return False


def _has_literal(items: Iterable[Any]) -> bool:
    """Whether a certain character is part of every match of an expression."""
    for operation, argument in items:
        kind = str(operation)
        if kind == "LITERAL":
            return True
        if kind == "SUBPATTERN" and _has_literal(argument[3]):
            return True
        if kind == "BRANCH" and all(_has_literal(branch) for branch in argument[1]):
            return True
    return False


def _context(name: str, place: int) -> Context:
    before = name[place - 1] if place else None
    after = name[place] if place < len(name) else None
    return before, after, place + 1 == len(name)


def _position(code: str, flags: int) -> Callable[[str, int], bool]:
    """Whether an expression that consumes nothing holds at a place of a name, as ``re`` itself sees it."""
    holds = re.compile(POSITIONS[code], flags & (re.ASCII | re.MULTILINE))
    return lambda name, place: holds.match(name, place) is not None
