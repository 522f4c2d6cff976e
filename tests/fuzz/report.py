"""What to say of a case that is neither right nor clearly refused."""

from __future__ import annotations

from fuzz.cases import case
from fuzz.pool import Key

GOOD = ("right", "clear", "transformers' own")


def problems(key: Key, said: dict[str, str]) -> list[str]:
    """One line for each thing that is wrong, with the command that shows the case again."""
    seed, kind, number = key
    this = case(*key)
    title = f"{kind}: {this.mutation.name} of {this.base}"
    again = f"python tests/fuzz/run.py --seed {seed} --kind {kind!r} --number {number}"
    return [
        f"{title}: {what} {said[what]}: {_printable(said.get(f'{what}_detail', ''))}\n    {again}"
        for what in ("load", "inspect")
        if what in said and said[what] not in GOOD
    ]


def _printable(text: str) -> str:
    return text.encode("unicode_escape").decode()
