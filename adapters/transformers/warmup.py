"""Kernels compiled before the first call of a loaded model, for those who ask for it."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch

from graftq.adapters.transformers.packed_layers import packed_modules
from graftq.plugin import switches
from graftq.quant_linear.experts import QuantExperts
from graftq.quant_linear.gpu.warmup import compile_kernels
from graftq.quant_linear.linear import QuantLinear
from graftq.quant_linear.spec import QuantSpec

logger = logging.getLogger("graftq")

Arguments = tuple[torch.Tensor, ...]


def warm_up(model: Any, tokens: int = 4096) -> int:
    """Compile every kernel that the packed layers of ``model`` need for any number of tokens up to ``tokens``.

    A call's tokens are those of all its sequences. The model is run once, on ``model.dummy_inputs``. With
    ``GRAFTQ_WARM_UP`` in the environment, a number of tokens, this is done whenever a packed model is loaded.

    Returns:
        The number of kernels that were compiled, or read from Triton's cache on disk; 0 without a GPU.
    """
    calls = _calls(model)
    compiled = 0
    for module in model.modules():
        if module in calls:
            compiled += compile_kernels(module, partial(_call_experts, module, calls[module]), tokens)
        elif isinstance(module, QuantLinear):
            spec = module.spec if module.shared is None else module.shared[0].spec_at(module.shared[1])
            if spec is not None:
                compiled += compile_kernels(module, partial(_multiply, module, spec), tokens)
    return compiled


def warm_up_packed(model: Any, tokens: int) -> None:
    """The same for a model that may not be packed; one that cannot be run on its dummy inputs is left as it is."""
    if next(packed_modules(model), None) is None:
        return
    try:
        warm_up(model, tokens)
    except Exception as error:
        logger.warning("graftq: %s: kernels are compiled when they are first needed: %s", switches.WARM_UP, error)


def _calls(model: Any) -> dict[QuantExperts, Arguments]:
    """Run the model, and return what its experts were given: models differ in the dtypes of their routers."""
    calls: dict[QuantExperts, Arguments] = {}

    def remember(module: QuantExperts, arguments: Arguments) -> None:
        calls.setdefault(module, arguments)

    experts = [module for module in model.modules() if isinstance(module, QuantExperts)]
    hooks = [module.register_forward_pre_hook(remember) for module in experts]
    try:
        with torch.no_grad():
            model(**{name: value.to(model.device) for name, value in model.dummy_inputs.items()})
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _call_experts(module: QuantExperts, arguments: Arguments, tokens: int) -> torch.Tensor:
    found: torch.Tensor = module(*[argument.new_zeros(tokens, *argument.shape[1:]) for argument in arguments])
    return found


def _multiply(layer: QuantLinear, spec: QuantSpec, tokens: int) -> torch.Tensor:
    device = next(iter(layer.packed().values())).device
    return layer.multiply(torch.empty(tokens, layer.in_features, dtype=layer.dtype, device=device), spec)
