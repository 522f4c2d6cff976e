"""The command line: ``graftq doctor``, ``graftq inspect`` and ``graftq quantize``."""

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
        if parsed.command == "quantize":
            return _quantize(parsed)
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
    quantize = commands.add_parser("quantize", help="make a checkpoint out of a float model, block by block from disk")
    quantize.add_argument("model", metavar="MODEL", help="a folder, or a repository of the Hub")
    quantize.add_argument("out", metavar="OUT", help="a folder that is empty or not there")
    quantize.add_argument("--revision", help="branch, tag or commit of the repository")
    quantize.add_argument("--dataset", required=True, help="a text file, a .jsonl file, or wikitext2, c4 or c4-new")
    quantize.add_argument("--bits", type=int, default=4, help="2, 3, 4 or 8; 4 if not given")
    quantize.add_argument("--group-size", type=int, default=128, help="-1 for one group; 128 if not given")
    quantize.add_argument("--desc-act", action="store_true", help="AutoGPTQ's act-order, which costs time at inference")
    quantize.add_argument("--asym", action="store_true", help="zero points of their own for every group")
    quantize.add_argument("--damp-percent", type=float, default=0.1, help="0.1 if not given")
    quantize.add_argument("--no-true-sequential", action="store_true", help="faster, and a little worse")
    quantize.add_argument("--effort", default="normal", help="autogptq (the classical method), normal or high")
    quantize.add_argument("--lm-head", action="store_true", help="quantize the output embedding, too")
    quantize.add_argument("--seq-len", type=int, default=2048, help="tokens of a calibration row")
    quantize.add_argument("--tokens", type=int, default=262144, help="calibration tokens in all, at most")
    quantize.add_argument("--device", help="where to compute; a GPU if there is one")
    quantize.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="what to run the model in")
    quantize.add_argument("--resume", action="store_true", help="go on with an unfinished run in OUT")
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


def _quantize(arguments: argparse.Namespace) -> int:
    from importlib.metadata import entry_points

    adapter = next(iter(entry_points(group="graftq.adapters", name="transformers")))
    return adapter.load().quantize(arguments)


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        print(printable(line, LONGEST_LINE), flush=True)  # names in a checkpoint may be commands to the terminal


if __name__ == "__main__":
    sys.exit(main())
