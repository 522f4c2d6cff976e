"""What ``import torch`` costs more because graftq is installed."""

from __future__ import annotations

import sys
from pathlib import Path

from support.processes import evaluate

LIMIT_MS = 5.0

# What torch does for its entry point, again and again as if for the first time. It waits for nothing, so that the
# processor's time is what it costs; the clock on the wall would count whatever else runs on the machine.
MEASURE = """
import torch, statistics, sys, time
times = []
for _ in range(9):
    for name in [name for name in sys.modules if name.partition(".")[0] in ("graftq", "_graftq_autoload")]:
        del sys.modules[name]
    begin = time.process_time()
    from _graftq_autoload import autoload
    autoload()
    times.append(time.process_time() - begin)
    assert "Finder" in type(sys.meta_path.pop(0)).__name__
print(statistics.median(times) * 1000)
"""
LOADED = "import torch, sys; print(*sorted(sys.modules), sep='\\n')"


def test_entry_point_takes_at_most_5_ms(tmp_path: Path) -> None:
    """With compiled modules, as pip leaves them behind."""
    compiled = {"PYTHONPYCACHEPREFIX": str(tmp_path), "PYTHONDONTWRITEBYTECODE": ""}
    (median,) = evaluate(MEASURE, TORCH_DEVICE_BACKEND_AUTOLOAD="0", **compiled)
    assert float(median) < LIMIT_MS


def test_no_third_party_module_is_loaded() -> None:
    without = set(evaluate(LOADED, TORCH_DEVICE_BACKEND_AUTOLOAD="0"))
    added = set(evaluate(LOADED)) - without
    assert "graftq.plugin.import_hooks" in added
    foreign = {name for name in added if name.partition(".")[0] not in sys.stdlib_module_names}
    assert all(name.startswith("graftq.plugin") or name in ("graftq", "_graftq_autoload") for name in foreign), foreign
