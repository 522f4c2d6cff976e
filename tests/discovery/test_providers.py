"""Kernel providers: checked when they are registered, and registered once, however many threads ask at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.processes import evaluate, run, warnings_of, write_distribution

KERNELS = """
from graftq.plugin.hookspecs import hookimpl
from graftq.quant_linear.reference import TorchProvider

class Provider(TorchProvider):
    def __init__(self, **members):
        self.name, self.priority = "other", 10
        vars(self).update(members)

@hookimpl
def graftq_kernels():
    {body}
"""
FLAWS = {
    "priority='high'": "kernel 'other' has the priority 'high', not an integer",
    "priority=None": "kernel 'other' has the priority None, not an integer",
    "layout=None": "kernel 'other' has None for layout, not a function",
    "judge='yes'": "kernel 'other' has 'yes' for judge, not a function",
    "linear=3": "kernel 'other' has 3 for linear, not a function",
    "name=''": "has an empty name",
    "name=7": "has the name 7, not a text",
    "name='cpu'": "a second kernel called 'cpu'",
    "name='fine'": "a second kernel called 'fine'",
}
TELL = """
from graftq.plugin import failures, manager
print(*(f"{provider.name}: {type(provider).__module__}" for provider in manager.kernel_providers()), sep=", ")
"""


@pytest.fixture(scope="module")
def flawed(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], list[str]]:
    """The providers of a process with all flaws at once, and its warnings."""
    body = f"return [Provider(name='fine'), {', '.join(f'Provider({flaw})' for flaw in FLAWS)}]"
    folder = write_distribution(
        # found before graftq itself, whose names stay its own all the same
        tmp_path_factory.mktemp("flawed"),
        "flawed",
        {"graftq.kernels": {"flawed": "flawed", "exits": "exits"}},
        {"flawed.py": KERNELS.format(body=body), "exits.py": "raise SystemExit(2)"},
    )
    done = run("-c", TELL, path=[folder])
    return done.stdout.splitlines(), warnings_of(done)


@pytest.mark.parametrize("flaw", FLAWS)
def test_a_flaw_is_refused_by_name(flaw: str, flawed: tuple[list[str], list[str]]) -> None:
    (warning,) = (line for line in flawed[1] if FLAWS[flaw] in line)
    assert f"kernel {list(FLAWS).index(flaw) + 2} of graftq.kernels:flawed failed" in warning


def test_an_exit_is_contained(flawed: tuple[list[str], list[str]]) -> None:
    assert any("graftq.kernels:exits failed" in line and "SystemExit: 2" in line for line in flawed[1])


def test_all_others_are_there(flawed: tuple[list[str], list[str]]) -> None:
    (providers,) = flawed[0]
    assert set(providers.split(", ")) == {
        "cpu: graftq.quant_linear.cpu.provider",
        "torch: graftq.quant_linear.reference",
        "triton: graftq.quant_linear.gpu.provider",
        "fine: flawed",
    }


THREADS = """
import sys, threading, time
from graftq.plugin import failures, manager

sys.setswitchinterval(1e-6)
start = threading.Barrier(8)
found = []

def load():
    start.wait()
    found.append([id(provider) for provider in manager.kernel_providers()])

threads = [threading.Thread(target=load) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(len(found), len(found[0]), all(one == found[0] for one in found), failures.recorded)
"""


@pytest.mark.parametrize("attempt", range(3))
def test_first_asked_by_eight_threads(attempt: int, tmp_path: Path) -> None:
    slow = KERNELS.format(body="return [Provider(name='slow')]") + "import time\ntime.sleep(0.1)\n"
    folder = write_distribution(tmp_path, "slow", {"graftq.kernels": {"slow": "slow"}}, {"slow.py": slow})
    assert evaluate(THREADS, path=[folder]) == ["8 4 True {}"]


ADAPTER = """
import time
from graftq.plugin.hookspecs import hookimpl
from graftq.plugin.patching import replace_attribute

time.sleep(0.1)

def patch(module):
    time.sleep(0.02)
    replace_attribute(module, "load", lambda stock: lambda: "graftq's " + stock())

@hookimpl
def graftq_seams(root):
    return {f"framework.part{number}": patch for number in range(4)} if root == "framework" else None
"""
IMPORTS = """
import sys, threading
from _graftq_autoload import autoload
autoload()
sys.setswitchinterval(1e-6)
start, loaded = threading.Barrier(8), []

def load(number):
    start.wait()
    loaded.append(__import__(f"framework.part{number % 4}", fromlist=["load"]).load())

threads = [threading.Thread(target=load, args=(number,)) for number in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
from graftq.plugin import failures
print(len(loaded), set(loaded), failures.recorded)
"""


@pytest.mark.parametrize("attempt", range(3))
def test_first_imported_by_eight_threads(attempt: int, tmp_path: Path) -> None:
    parts = {f"framework/part{number}.py": "def load():\n    return 'stock'\n" for number in range(4)}
    files = {"adapter.py": ADAPTER, "framework/__init__.py": "", **parts}
    folder = write_distribution(tmp_path, "adapter", {"graftq.adapters": {"framework": "adapter"}}, files)
    assert evaluate(IMPORTS, path=[folder]) == ['8 {"graftq\'s stock"} {}']
