"""The import hook: every order of imports, every kind of finder, every kind of process, there and back."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pluggy
import pytest
from support.processes import ROOT, TESTS, evaluate, run, warnings_of

CHECKPOINT = ROOT / "examples" / "tiny-mixtral-gptq"
TOY = Path(__file__).parent / "third_party"

STATE = "\nfrom support.seams import state\nprint(state())"


@pytest.mark.parametrize(
    "imports",
    [
        "import torch, transformers",
        "import transformers, torch",
        "import transformers.modeling_utils",
        "import transformers.quantizers.auto",
        "from transformers import PreTrainedModel\nfrom transformers import MixtralForCausalLM",
    ],
    ids=["torch first", "transformers first", "modeling_utils first", "quantizers first", "a model class first"],
)
def test_order_of_imports(imports: str) -> None:
    assert evaluate(imports + STATE) == ["all"]


def test_auto_class_as_the_very_first_import_loads_a_checkpoint() -> None:
    code = f"""
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(CHECKPOINT)!r})
print(type(model.model.layers[0].self_attn.q_proj).__name__)
"""
    assert evaluate(code) == ["QuantLinear"]


def test_modules_imported_before_the_hook_are_patched_at_the_next_import() -> None:
    code = """
from support.seams import state
import transformers.modeling_utils
from graftq.plugin.bootstrap import autoload
before = state()
autoload()
import transformers.models.llama.modeling_llama
print(before, state())
"""
    assert evaluate(code, TORCH_DEVICE_BACKEND_AUTOLOAD="0") == ["none all"]


WORKERS = """
import multiprocessing
import sys
import torch
import transformers.modeling_utils
from support.seams import state

def tell(_):
    from graftq.plugin.import_hooks import Finder
    return state(), sum(isinstance(finder, Finder) for finder in sys.meta_path)

if __name__ == "__main__":
    for method in ("spawn", "fork"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            print(method, *pool.map(tell, [0])[0])
"""


def test_spawned_and_forked_workers(tmp_path: Path) -> None:
    (tmp_path / "workers.py").write_text(WORKERS)
    assert run(str(tmp_path / "workers.py"), path=[TESTS]).stdout.splitlines() == ["spawn all 1", "fork all 1"]


def test_there_twice_and_back() -> None:
    """autoload() twice patches once; uninstall() restores every object; autoload() works again after that."""
    code = """
import sys
from support.seams import seams, state
import transformers.modeling_utils
stock = seams()
from graftq.plugin import bootstrap, import_hooks
for module in ("llama", "gemma"):
    bootstrap.autoload()
    bootstrap.autoload()
    print(sum(isinstance(finder, import_hooks.Finder) for finder in sys.meta_path))
    __import__(f"transformers.models.{module}.modeling_{module}")
    wrapped = {name: value.__wrapped__ for name, value in seams().items() if hasattr(value, "__wrapped__")}
    print(state(), [name for name, value in wrapped.items() if value is not stock[name]])
    import_hooks.uninstall()
    print(import_hooks.finder(), [name for name, value in seams().items() if value is not stock[name]])
"""
    assert evaluate(code, TORCH_DEVICE_BACKEND_AUTOLOAD="0") == ["1", "all []", "None []"] * 2


def test_switched_off_leaves_transformers_as_it_was() -> None:
    describe = """
import torch, sys
from support.seams import seams
print([(name, value.__module__, value.__qualname__) for name, value in seams().items()])
print([name for name in sys.modules if name.startswith("graftq")])
print([type(finder).__name__ for finder in sys.meta_path])
"""
    stock, _, finders = evaluate(describe, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert evaluate(describe, GRAFTQ_DISABLE="1") == [stock, "[]", finders]


BARE = """
import sys
sys.path = [entry for entry in sys.path if not entry.endswith("site-packages")]
from graftq.plugin.bootstrap import autoload
autoload()
from importlib.util import find_spec
print([find_spec(name) for name in ("peft", "transformers", "optimum", "text_generation_server", "auto_gptq")])
"""


def test_looking_for_what_is_not_installed_says_nothing(installed: Path) -> None:
    """transformers, for one, looks for PEFT."""
    (installed / "pluggy").symlink_to(Path(pluggy.__file__).parent)
    done = run("-c", BARE, path=[installed])
    assert done.stdout.strip() == str([None] * 5)
    assert not warnings_of(done)


# What follows has no need of torch: the framework is a toy, its adapter the third party's.

EDITABLE_FINDER = """
import importlib.util, sys

class EditableFinder:
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == "toyframework":
            return importlib.util.spec_from_file_location(name, {folder!r} + "/toyframework/__init__.py")

sys.meta_path.append(EditableFinder)
"""
LOAD = """
from graftq.plugin.bootstrap import autoload
autoload()
import toyframework.engine
print(toyframework.engine.load("model"), toyframework.engine.__file__)
import inspect
print(inspect.getsource(toyframework.engine.load) is not None, type(toyframework.engine.__spec__.loader).__name__)
"""


@pytest.fixture
def adapter(third_party_wheel: Path, tmp_path: Path) -> Path:
    """The third party's adapter and metadata, without the toy framework."""
    target = tmp_path / "adapter"
    with zipfile.ZipFile(third_party_wheel) as archive:
        archive.extractall(target, [name for name in archive.namelist() if not name.startswith("toyframework/")])
    return target


def test_framework_found_by_another_finder(adapter: Path) -> None:
    """As editable installs are: setuptools puts a finder of its own behind the standard ones."""
    loaded, kept = evaluate(EDITABLE_FINDER.format(folder=str(TOY)) + LOAD, path=[adapter])
    assert loaded == f"graftq's stock model {TOY / 'toyframework' / 'engine.py'}"
    assert kept == "True SourceFileLoader"


def test_framework_in_a_zip(adapter: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "toy.zip", "w") as archive:
        for name in ("__init__.py", "engine.py"):
            archive.write(TOY / "toyframework" / name, f"toyframework/{name}")
    loaded, kept = evaluate(LOAD, path=[adapter, tmp_path / "toy.zip"])
    assert loaded == f"graftq's stock model {tmp_path / 'toy.zip' / 'toyframework' / 'engine.py'}"
    assert kept == "True zipimporter"


def test_a_module_that_is_not_there_stays_an_import_error(adapter: Path) -> None:
    code = """
from graftq.plugin.bootstrap import autoload
autoload()
for name in ("toyframework", "toyframework.engine"):
    try:
        __import__(name)
    except ModuleNotFoundError as error:
        print(error)
"""
    assert evaluate(code, path=[adapter]) == ["No module named 'toyframework'"] * 2
