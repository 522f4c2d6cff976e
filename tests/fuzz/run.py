"""Judge many damaged checkpoints, and print every one that is neither right nor clearly refused.

    python tests/fuzz/run.py --cases 5000 --seed 7
    python tests/fuzz/run.py --kind headers --cases 200 --seed 7
    python tests/fuzz/run.py --kind headers --number 17 --seed 7    # one case again, with all that is known of it

The same seed, kind and number always give the same case. The exit status is 0 if all cases are well.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from fuzz.cases import KINDS  # noqa: E402
from fuzz.pool import Key, Pool  # noqa: E402
from fuzz.report import problems  # noqa: E402


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; 0 if every case is right or clear."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=300, help="how many, over all kinds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=sorted(KINDS), help="only this one")
    parser.add_argument("--number", type=int, help="only this case of the kind")
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1), help="processes side by side")
    asked = parser.parse_args(arguments)
    kinds = [asked.kind] if asked.kind else sorted(KINDS)
    keys: list[Key] = [(asked.seed, kinds[i % len(kinds)], i // len(kinds)) for i in range(asked.cases)]
    if asked.number is not None:
        keys = [(asked.seed, kinds[0], asked.number)]
    loads, inspections, bad = Counter[str](), Counter[str](), 0
    began = time.monotonic()
    pool = Pool(min(asked.workers, len(keys)))
    for key, said in pool.judge(keys):
        loads[said["load"]] += 1
        inspections[said.get("inspect", said["load"])] += 1
        found = problems(key, said)
        bad += bool(found)
        for line in found or ([str(said)] if asked.number is not None else []):
            print(line, flush=True)
    pool.close()
    print(f"{len(keys)} cases in {time.monotonic() - began:.0f} s; loading: {_counts(loads)}")
    print(f"inspecting: {_counts(inspections)}")
    return bad > 0


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counter.most_common())


if __name__ == "__main__":
    sys.exit(main())
