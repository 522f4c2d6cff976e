"""``import auto_gptq``: graftq's only where AutoGPTQ is absent and the user has asked for it, and never silently."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.processes import evaluate, run, write_distribution

LOG = "import logging; logging.basicConfig(level=logging.INFO, format='%(levelname)s %(message)s')\n"
AUTOLOAD = "from graftq.plugin.bootstrap import autoload\nautoload()\n"  # what `import torch` comes to
IMPORT = f"{LOG}{AUTOLOAD}import auto_gptq\nprint(auto_gptq.__version__, auto_gptq.__spec__.origin)"
INSTALL = f"{LOG}from graftq.adapters import auto_gptq\nauto_gptq.install()\n"


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where something is installed that calls itself AutoGPTQ."""
    files = {"auto_gptq/__init__.py": "__version__ = 'the real one'"}
    return write_distribution(tmp_path_factory.mktemp("real"), "auto_gptq", {}, files)


def test_not_asked_for() -> None:
    done = run("-c", IMPORT, check=False)
    assert "ModuleNotFoundError: No module named 'auto_gptq'" in done.stderr
    assert "stands in" not in done.stderr


def test_asked_for_in_the_environment() -> None:
    done = run("-c", IMPORT, GRAFTQ_AUTO_GPTQ="1")
    assert done.stdout == "0.7.1+graftq graftq.adapters.auto_gptq\n"
    (line,) = done.stderr.splitlines()
    assert line.startswith("INFO graftq stands in for auto_gptq, which is not installed, as GRAFTQ_AUTO_GPTQ=1 asks")


def test_asked_for_by_a_call() -> None:
    """No torch is needed before, and neither torch nor transformers is imported yet."""
    imported = "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = run("-c", f"{INSTALL}import sys\nimport auto_gptq.utils\n{imported}")
    assert done.stdout == "[]\n"
    assert "INFO graftq stands in for auto_gptq, which is not installed, as install() asks" in done.stderr


@pytest.mark.parametrize("code", [IMPORT, f"{INSTALL}{IMPORT}"], ids=["environment", "call"])
def test_the_real_one_wins(code: str, real: Path) -> None:
    done = run("-c", code, path=[real], GRAFTQ_AUTO_GPTQ="1")
    assert done.stdout.startswith("the real one")
    assert "stands in" not in done.stderr
    assert ("WARNING graftq does not stand in for auto_gptq: it is installed" in done.stderr) == (code != IMPORT)


def test_switched_off() -> None:
    done = run("-c", f"{INSTALL}{IMPORT}", check=False, GRAFTQ_AUTO_GPTQ="1", GRAFTQ_DISABLE="1")
    assert "WARNING graftq does not stand in for auto_gptq: GRAFTQ_DISABLE is set" in done.stderr
    assert "ModuleNotFoundError" in done.stderr


def test_uninstalling_takes_it_away() -> None:
    code = """
from graftq.adapters import auto_gptq
from graftq.plugin import import_hooks
from importlib.util import find_spec
auto_gptq.install()
print(find_spec("auto_gptq") is not None)
import_hooks.uninstall()
print(find_spec("auto_gptq"))
"""
    assert evaluate(code) == ["True", "None"]


def test_doctor_says_so() -> None:
    code = """
import os
from graftq.plugin.cli.doctor import _taken_over as tell
print(tell("auto_gptq"))
os.environ["GRAFTQ_AUTO_GPTQ"] = "1"
print(tell("auto_gptq"))
"""
    assert evaluate(code) == ["not installed", "not installed; graftq.adapters.auto_gptq stands in"]


@pytest.mark.usefixtures("auto_gptq_asked_for")
def test_names_that_programs_import() -> None:
    import auto_gptq
    from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig, exllama_set_max_input_length, get_gptq_peft_model
    from auto_gptq.modeling import BaseGPTQForCausalLM
    from auto_gptq.modeling._base import BaseGPTQForCausalLM as Same
    from auto_gptq.quantization import BaseQuantizeConfig as SameConfig
    from auto_gptq.utils.exllama_utils import exllama_set_max_input_length as same_function
    from auto_gptq.utils.peft_utils import GPTQLoraConfig

    assert (Same, SameConfig, same_function) == (BaseGPTQForCausalLM, BaseQuantizeConfig, exllama_set_max_input_length)
    assert auto_gptq.modeling.auto.AutoGPTQForCausalLM is AutoGPTQForCausalLM
    with pytest.raises(ImportError, match="nn_modules"):
        import auto_gptq.nn_modules
    for adapters in (get_gptq_peft_model, GPTQLoraConfig):
        with pytest.raises(NotImplementedError, match=r"peft\.get_peft_model\(model\.model"):
            adapters()
