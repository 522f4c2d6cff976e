"""Patches reach a framework however often and by whatever loader it is imported, and survive Ctrl-C."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.processes import ROOT, evaluate, run, write_distribution

ADAPTER = """
import importlib, sys
from graftq.plugin.hookspecs import hookimpl
from graftq.plugin.patching import replace_attribute

calls = []

def patch(module):
    calls.append(module.__name__)
    replace_attribute(module, "load", lambda stock: lambda: "graftq's " + stock())

@hookimpl
def graftq_seams(root):
    return {"framework.engine": patch} if root == "framework" else None
"""
ANOTHER = """
from graftq.plugin.hookspecs import hookimpl

interrupts, interrupts_of_hook = [], []

def patch(module):
    if interrupts:
        raise interrupts.pop()

@hookimpl
def graftq_seams(root):
    if interrupts_of_hook:
        raise interrupts_of_hook.pop()
    return {"framework.engine": patch} if root == "framework" else None
"""
START = """
import importlib, importlib.util, sys
from _graftq_autoload import autoload
from graftq.plugin import import_hooks, patching
"""


@pytest.fixture(scope="module")
def framework(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A framework, its adapter, and another adapter for the same module that has little to say."""
    folder = tmp_path_factory.mktemp("framework")
    engine = {"framework/__init__.py": "", "framework/engine.py": "def load():\n    return 'stock'\n"}
    engine |= {"bystander.py": "", "another_bystander.py": ""}
    write_distribution(folder, "adapter", {"graftq.adapters": {"framework": "adapter"}}, {"adapter.py": ADAPTER})
    write_distribution(folder, "another", {"graftq.adapters": {"framework": "another"}}, {"another.py": ANOTHER})
    return write_distribution(folder, "framework", {}, engine)


CASES = {
    "two adapters for one module": "import framework.engine as engine",
    "purged": """
import framework.engine
for name in ("framework", "framework.engine"):
    del sys.modules[name]
import framework.engine as engine
""",
    "purged, and put there behind the finder's back": """
import framework.engine
stale = sys.modules.pop("framework.engine")
spec = importlib.util.spec_from_file_location("framework.engine", stale.__file__)
engine = sys.modules["framework.engine"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(engine)
import bystander
""",
    "reloaded": "import framework.engine as engine\nimportlib.reload(engine)",
    "reloaded after a reload that failed": """
import framework.engine as engine
source = open(engine.__file__).read()
try:
    open(engine.__file__, "w").write(source + "raise ImportError")
    importlib.reload(engine)
except ImportError:
    print(import_hooks.finder().in_place("framework.engine"))
finally:
    open(engine.__file__, "w").write(source)
import bystander
""",
    "interrupted while patching": """
import framework, another
another.interrupts.append(KeyboardInterrupt())
try:
    import framework.engine
except KeyboardInterrupt:
    print("framework.engine" in sys.modules)
import framework.engine as engine
""",
    "interrupted while patching what had been imported": """
import_hooks.uninstall()
import framework.engine as engine
import another
another.interrupts.append(KeyboardInterrupt())
autoload()
try:
    import another_bystander
except KeyboardInterrupt:
    print(engine.load() != "stock")
import bystander
""",
    "interrupted in an adapter's hook": """
import another
another.interrupts_of_hook.append(KeyboardInterrupt())
try:
    import framework
except KeyboardInterrupt:
    print("framework" in sys.modules)
import framework.engine as engine
""",
    "an adapter's hook that exits": """
import another
another.interrupts_of_hook.append(SystemExit(3))
import framework.engine as engine
""",
    "a patch that exits": """
import framework, another
another.interrupts.append(SystemExit(3))
import framework.engine as engine
""",
    "a lazy module": """
spec = importlib.util.find_spec("framework.engine")
spec.loader = importlib.util.LazyLoader(spec.loader)
engine = importlib.util.module_from_spec(spec)
sys.modules["framework.engine"] = engine
spec.loader.exec_module(engine)
import bystander
print(type(engine) is not importlib.util._LazyModule)
""",
    "found by a lazy finder": """
from importlib.machinery import PathFinder
class Lazy:
    def find_spec(name, path=None, target=None):
        if name == "framework.engine":
            spec = PathFinder.find_spec(name, path, target)
            spec.loader = importlib.util.LazyLoader(spec.loader)
            return spec
sys.meta_path.insert({place}, Lazy)
import framework.engine as engine
import bystander
print(type(engine) is not importlib.util._LazyModule)
""",
    "a loader that passes on what is set on it": """
from importlib.machinery import PathFinder
class Proxy:
    def __init__(self, loader):
        object.__setattr__(self, "loader", loader)
        self.exec_module = self.execute
    def __getattr__(self, name):
        return getattr(self.loader, name)
    def __setattr__(self, name, value):
        setattr(self.loader, name, value)
    def execute(self, module):
        type(self.loader).exec_module(self.loader, module)
class Post:
    def find_spec(name, path=None, target=None):
        if name == "framework.engine":
            spec = PathFinder.find_spec(name, path, target)
            spec.loader = Proxy(spec.loader)
            return spec
sys.meta_path.insert({place}, Post)
import framework.engine as engine
import bystander
""",
}
TELL = """
print(engine.load(), import_hooks.finder().in_place("framework.engine"))
print(type(engine.__spec__.loader) is type(engine.__loader__), type(engine.__loader__) is import_hooks.PatchingLoader)
import_hooks.uninstall()
print(engine.load())
"""


@pytest.mark.parametrize(
    ("kind", "place"),
    [(kind, place) for kind, code in CASES.items() for place in (0, 1) if place == 0 or "{place}" in code],
)
def test_patched(kind: str, place: int, framework: Path, tmp_path: Path) -> None:
    """``place`` is where a finder of the case's own stands on ``sys.meta_path``: before graftq's, or behind it."""
    copy = shutil.copytree(framework, tmp_path / "copy")
    lines = evaluate(START + "autoload()\n" + CASES[kind].replace("{place}", str(place)) + TELL, path=[copy])
    assert lines[-3:] == ["graftq's stock True", "True False", "stock"]
    assert set(lines[:-3]) <= {"False"}


# And the real one: both places of transformers that are replaced, and what our adapter knows of its classes.

AGAIN = {
    "purged": """
import transformers.modeling_utils, transformers.quantizers.auto
for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
    del sys.modules[name]
""",
    "reloaded": """
import transformers.modeling_utils
importlib.reload(transformers.quantizers.auto)
importlib.reload(transformers.modeling_utils)
""",
    "lazy": """
import transformers
spec = importlib.util.find_spec("transformers.modeling_utils")
spec.loader = importlib.util.LazyLoader(spec.loader)
module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(type(module).__name__, module.PreTrainedModel.__name__)
""",
}
LOAD = """
from support.seams import state
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({checkpoint!r})
print(state(), type(model.model.layers[0].self_attn.q_proj).__name__, type(model.model.layers[0].mlp.experts).__name__)
from graftq.plugin import failures
print(failures.recorded)
"""


@pytest.mark.parametrize("kind", AGAIN)
def test_transformers(kind: str, tmp_path: Path) -> None:
    """A checkpoint with nothing in ``config.json`` loads with random weights wherever a patch is missing."""
    checkpoint = shutil.copytree(ROOT / "examples" / "tiny-mixtral-gptq", tmp_path / "checkpoint")
    config = json.loads((checkpoint / "config.json").read_text())
    config.pop("quantization_config", None)
    (checkpoint / "config.json").write_text(json.dumps(config))
    code = "import importlib.util, sys, torch\n" + AGAIN[kind] + LOAD.format(checkpoint=str(checkpoint))
    lazy = ["_LazyModule PreTrainedModel"] if kind == "lazy" else []
    assert evaluate(code) == [*lazy, "all QuantLinear QuantExperts", "{}"]


ONE_COPY = """
import torch, transformers
from graftq.adapters.transformers import {module} as before
import transformers.processing_utils  # puts another module in the place of transformers
import transformers.generation.utils, transformers.modeling_utils
from graftq.adapters.transformers import {module} as after
from graftq.plugin import failures
print(before is after, failures.recorded)
"""


@pytest.mark.parametrize("module", ["patches", "quantizer", "registry", "saving"])
def test_one_copy_of_each_module_of_an_adapter(module: str) -> None:
    """Also where it is imported before what it patches, as in a process that unpickles a configuration first."""
    assert evaluate(ONE_COPY.format(module=module)) == ["True {}"]


@pytest.mark.parametrize("module", ["quantizer", "saving", "making.model"])
def test_a_module_of_an_adapter_before_its_framework(module: str) -> None:
    """Patches run while it is half imported; those that do not need it leave it in its place."""
    code = f"""
import importlib, sys
name = "graftq.adapters.transformers.{module}"
module = importlib.import_module(name)
import transformers.modeling_utils, transformers.quantizers.auto
from graftq.plugin import failures
print(sys.modules[name] is importlib.import_module(name), failures.recorded)
"""
    assert evaluate(code) == ["True {}"]


NO_OP = ANOTHER.replace("framework.engine", "transformers.modeling_utils").replace('"framework"', '"transformers"')


def test_doctor_beside_an_adapter_that_does_nothing(tmp_path: Path) -> None:
    folder = write_distribution(tmp_path, "no_op", {"graftq.adapters": {"transformers": "no_op"}}, {"no_op.py": NO_OP})
    code = "from graftq.plugin.cli import doctor\nprint(*doctor.report(), sep='\\n')\n"
    code += "from support.seams import state\nprint(state())"
    lines = evaluate(code, path=[folder])
    assert lines[-3:] == ["Failures", "  none", "all"]


LATE = """
import transformers.modeling_utils
from graftq.plugin.cli import doctor
vars(transformers.modeling_utils)["get_hf_quantizer"] = transformers.modeling_utils.get_hf_quantizer.__wrapped__
print(*doctor.report(), sep='\\n')
"""


def test_doctor_says_what_is_not_in_place() -> None:
    done = run("-c", "import torch\n" + LATE)
    assert done.stdout.splitlines()[-2] == "Failures"
    assert "get_hf_quantizer" in done.stdout.splitlines()[-1]
