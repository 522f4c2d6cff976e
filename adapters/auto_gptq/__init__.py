"""AutoGPTQ's interface: programs written for ``auto_gptq`` load their checkpoints with graftq, by transformers.

Use it as ``from graftq.adapters.auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig``. Where AutoGPTQ is not
installed, ``import auto_gptq`` gives this package if the user asks for it: by ``GRAFTQ_AUTO_GPTQ=1`` in the
environment of a program that imports torch first, or by :func:`install`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

from graftq.plugin.hookspecs import hookimpl

if TYPE_CHECKING:
    from graftq.adapters.auto_gptq.modeling import AutoGPTQForCausalLM, BaseGPTQForCausalLM
    from graftq.adapters.auto_gptq.quantize_config import BaseQuantizeConfig
    from graftq.adapters.auto_gptq.utils import exllama_set_max_input_length, get_gptq_peft_model

__all__ = [
    "AutoGPTQForCausalLM",
    "BaseGPTQForCausalLM",
    "BaseQuantizeConfig",
    "exllama_set_max_input_length",
    "get_gptq_peft_model",
    "install",
]
__version__ = "0.7.1+graftq"
"""The release of AutoGPTQ whose interface this is."""

_HOMES = {
    "AutoGPTQForCausalLM": "modeling",
    "BaseGPTQForCausalLM": "modeling",
    "BaseQuantizeConfig": "quantize_config",
    "exllama_set_max_input_length": "utils",
    "get_gptq_peft_model": "utils",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for; importing this package alone must not import transformers."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


@hookimpl
def graftq_seams(root: str) -> Mapping[str, Callable[[ModuleType], None]] | None:
    """Nothing to patch: a finder is put after all others, in case none of them finds ``auto_gptq``."""
    if root == "auto_gptq":
        from graftq.adapters.auto_gptq import stand_in

        stand_in.place()
    return None


def install() -> None:
    """Let ``import auto_gptq`` resolve to this package from now on, unless AutoGPTQ is installed."""
    from graftq.adapters.auto_gptq import stand_in

    stand_in.ask()
