"""The command line: ``graftq doctor`` and ``graftq inspect``."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from graftq.quant_linear.errors import CheckpointError, printable

LONGEST_LINE = 5000
"""Characters of a line; names in a checkpoint may be of any length."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 if all is well, 1 if something is wrong, 2 for a wrong call."""
    parsed = _parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may not have all letters of a name
    try:
        return int(_doctor() if parsed.command == "doctor" else _inspect(parsed.checkpoint, parsed.revision))
    except CheckpointError as error:
        print(f"graftq: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of a pipe, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="graftq", description="GPTQ checkpoints in the frameworks people use.")
    parser.add_argument("--version", action=_Version, nargs=0, help="graftq's version, and no more")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("doctor", help="what is installed, what graftq takes over, which kernels run here and why not")
    inspect = commands.add_parser("inspect", help="what a checkpoint holds, without loading its weights")
    inspect.add_argument("checkpoint", metavar="PATH_OR_REPO", help="a folder, or a repository of the Hub")
    inspect.add_argument("--revision", help="branch, tag or commit of the repository")
    return parser


class _Version(argparse.Action):
    """``--version``; argparse's own would want the version, which is read from metadata, for every command."""

    def __call__(self, parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        import graftq

        print(f"graftq {graftq.__version__}")
        parser.exit()


def _doctor() -> bool:
    from graftq.plugin import failures
    from graftq.plugin.cli import doctor

    _print(doctor.report())
    return bool(failures.recorded)


def _inspect(checkpoint: str, revision: str | None) -> bool:
    from graftq.plugin.checkpoint import inspection
    from graftq.plugin.checkpoint.source import Source
    from graftq.plugin.cli import report

    found = inspection.inspect(Source(checkpoint, {"revision": revision} if revision else {}))
    _print(report.report(found))
    return bool(found.errors)


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        print(printable(line, LONGEST_LINE), flush=True)  # names in a checkpoint may be commands to the terminal


if __name__ == "__main__":
    sys.exit(main())
