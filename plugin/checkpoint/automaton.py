"""Regular expressions as automata that follow all ways to match at once (Thompson, 1968).

The time for a name is at most its length times the size of the pattern. Sets of states that were met before are looked
up, which makes this some microseconds for the names of a model. What cannot be matched so (references to groups, and
repetitions that give nothing back) is unsupported.

So are repetitions of a repetition without a literal between two of them: readers of the same checkpoint that use ``re``
would hang, and nobody means them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

try:
    from re import _compiler as sre_compile  # type: ignore[attr-defined]
    from re import _parser as sre_parse  # type: ignore[attr-defined]
except ImportError:  # Python 3.10
    import sre_compile
    import sre_parse

SIZE_LIMIT = 10_000
"""Characters of a pattern, and states that it is made of once its repetitions are written out."""

NEW_STATE_COST = 4
"""Steps of looking up that stand for following one state."""

NEW_SET_COST = 40
"""Steps that stand for a set of states that was not met before."""

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


class Unsupported(Exception):
    """A pattern that is not matched here."""


class Exhausted(Exception):
    """Matching has used up its budget."""


class Budget:
    """Steps that may still be taken; a step is about as much work as looking up one set of states."""

    def __init__(self, left: int):
        self.left = left

    def spend(self, work: int) -> None:
        """Take that many steps.

        Raises:
            Exhausted: if there are none left.
        """
        self.left -= work
        if self.left < 0:
            raise Exhausted


Condition = Callable[[str, Sequence[int], int], bool]
"""Whether something holds at a place of a name."""


class _Set(dict[int, Any]):
    """States that are reached together, and what each position makes of them, as far as it was met.

    That is True if the pattern matches, False if it no longer can, and the next set otherwise.
    """

    def __init__(self, states: frozenset[int]):
        super().__init__()
        self.states = states


def positions_of(name: str, known: dict[Any, int]) -> list[int]:
    """The positions between the characters of a name, as small numbers: equal ones look alike to every condition.

    Args:
        name: The name.
        known: The numbers given so far; the characters before and after a position, and whether the latter is the last.
    """
    padded = [None, *name, None]
    keys = [(before, after, place == len(name) - 1) for place, (before, after) in enumerate(pairwise(padded))]
    return [known.setdefault(key, len(known)) for key in keys]


class Program:
    """A nondeterministic automaton: states that consume a character, and states that lead to others without doing so.

    Args:
        parsed: What ``re`` has parsed.
        flags: Those that hold for it.
        budget: Shared by all programs of a checkpoint.
        characters: Compiled expressions for one character, likewise shared.

    Raises:
        Unsupported: if it cannot be matched in bounded time.
    """

    def __init__(
        self, parsed: Iterable[Any], flags: int, budget: Budget, characters: dict[tuple[str, int], re.Pattern[str]]
    ):
        self.budget = budget
        self.consuming: dict[int, tuple[re.Pattern[str], int]] = {}
        self.choices: dict[int, tuple[int, ...]] = {}
        self.conditions: dict[int, tuple[Condition, int]] = {}
        self.size = 0
        self.looking: set[int] = set()  # states whose condition depends on more than the characters beside a place
        self._characters = characters
        self._sets: dict[frozenset[int], _Set] = {}
        self._start = self._set(frozenset((self._sequence(parsed, ACCEPT, flags),)))

    def matches(self, name: str, positions: Sequence[int], start: int = 0) -> bool:
        """Whether some part of ``name`` that begins at ``start`` matches.

        Args:
            name: The name.
            positions: From :func:`positions_of`.
            start: Where to begin.

        Raises:
            Exhausted: if it takes too long.
        """
        self.budget.spend(len(positions) - start)
        current = self._start
        for place in range(start, len(positions)):
            following = current.get(positions[place])
            if following is None:
                following = self._step(current, name, positions, place)
            if following is True or following is False:
                return following
            current = following
        return False

    def _set(self, states: frozenset[int]) -> _Set:
        if states not in self._sets:
            self._sets[states] = _Set(states)
        return self._sets[states]

    def _step(self, current: _Set, name: str, positions: Sequence[int], place: int) -> _Set | bool:
        """What the character at a place makes of a set of states that has not met it there."""
        reached = self._reach(current.states, name, positions, place)
        states = self._consume(reached, name[place : place + 1])
        following = True if ACCEPT in reached else self._set(states) if states else False
        if self.looking.isdisjoint(reached):
            current[positions[place]] = following
        return following

    def _reach(self, current: frozenset[int], name: str, positions: Sequence[int], place: int) -> set[int]:
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
                if holds(name, positions, place):
                    pending.append(then)
        self.budget.spend(NEW_SET_COST + NEW_STATE_COST * len(reached))
        return reached

    def _consume(self, reached: set[int], letter: str) -> frozenset[int]:
        """The states that follow with one more character; none at the end of a name."""
        waiting = [self.consuming[state] for state in reached if letter and state in self.consuming]
        return frozenset(then for accepts, then in waiting if accepts.match(letter))

    def _new(self) -> int:
        """A new state, which costs time and memory whatever it is for."""
        self.budget.spend(NEW_SET_COST)
        self.size += 1
        if self.size > SIZE_LIMIT:
            raise Unsupported(f"needs more than {SIZE_LIMIT} states")
        return self.size

    def _sequence(self, items: Iterable[Any], then: int, flags: int) -> int:
        """The state in which ``items`` begin; built from their end, so each knows what follows it."""
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
        raise Unsupported(f"uses {kind.lower()}, which is not matched in bounded time")

    def _choice(self, states: list[int]) -> int:
        state = self._new()
        self.choices[state] = tuple(states)
        return state

    def _repeat(self, least: int, most: int, inner: Any, then: int, flags: int) -> int:
        if least > SIZE_LIMIT or (most != sre_parse.MAXREPEAT and most > SIZE_LIMIT):
            raise Unsupported(f"needs more than {SIZE_LIMIT} states")
        if most > 1 and _varies(inner) and not _has_literal(inner):
            raise Unsupported("repeats a repetition, which can be matched in exponentially many ways")
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

    def _look(self, kind: str, direction: int, inner: Any, flags: int) -> Condition:
        program = Program(inner, flags, self.budget, self._characters)
        self.size += program.size
        self._new()
        back = 0 if direction > 0 else inner.getwidth()[0]  # what is looked back at has one width, says the parser
        wanted = kind == "ASSERT"
        return lambda name, positions, place: (
            (place >= back and program.matches(name, positions, place - back)) == wanted
        )

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


def _position(code: str, flags: int) -> Condition:
    """Whether an expression that consumes nothing holds at a place of a name, as ``re`` itself sees it."""
    holds = re.compile(POSITIONS[code], flags & (re.ASCII | re.MULTILINE))
    return lambda name, positions, place: holds.match(name, place) is not None
