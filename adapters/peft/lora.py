"""PEFT's LoRA layers around packed layers: the adapters have the names and shapes of those around the float model.

So an adapter trained on one loads on the other, and can be merged once the base model is dequantized.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners import lora
from torch import nn
from transformers.pytorch_utils import Conv1D

from graftq.adapters.peft.methods import check_merge
from graftq.quant_linear.experts import QuantExperts
from graftq.quant_linear.linear import QuantLinear
from graftq.quant_linear.offloaded import home

INITIALIZATIONS = (True, False, "gaussian", "eva", "orthogonal")
"""Values of ``init_lora_weights`` that do not change the base layer's weight."""


VARIANTS: tuple[tuple[str, ...], ...] = (
    (),
    ("use_dora",),
    ("alora_invocation_tokens",),
    ("use_bdlora",),
    ("velora_config",),
    ("monteclora_config",),
)
"""Fields of ``LoraConfig``, alone or together, that ask for a variant which is right on packed layers."""


class PackedLinear(lora.Linear):
    """LoRA around a :class:`QuantLinear`, or around the float layer that replaced it; only the latter can be merged."""

    @property
    def lora_variants(self) -> dict[Any, Any]:
        """The variants that leave the base layer's weight as it is, and are tested on packed layers."""
        return {names: kind for names, kind in super().lora_variants.items() if names in VARIANTS}

    def resolve_lora_variant(self, *, config: Any, **kwargs: Any) -> Any:
        """The variant that a configuration asks for.

        Raises:
            ValueError: for one that is not right on packed layers, or not known to be.
        """
        if config.use_qalora:
            raise ValueError("use_qalora: QA-LoRA is PEFT's for GPTQModel's layers, and graftq's layers do without it")
        try:
            return super().resolve_lora_variant(config=config, **kwargs)
        except ValueError as error:
            known = ", ".join(name for names in VARIANTS for name in names)
            raise ValueError(f"{error}; on packed layers these are right: {known}") from None

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the base layer's weight is [in_features, out_features], whatever the configuration says."""
        return isinstance(self.get_base_layer(), Conv1D)

    @fan_in_fan_out.setter
    def fan_in_fan_out(self, value: bool) -> None:
        """Ignored: the layer decides."""

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    def _get_base_layer_device_and_dtype(self, base_layer: Any) -> tuple[torch.device, torch.dtype]:
        if isinstance(base_layer, QuantLinear):
            return home(base_layer), base_layer.dtype
        return super()._get_base_layer_device_and_dtype(base_layer)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        """Add an adapter, unless it trains the base layer's bias, or its initialization changes the weight."""
        _check_initialization(config)
        base = self.get_base_layer()
        if config.bias != "none" and isinstance(base, QuantLinear) and base.spec.has_bias:
            raise ValueError(
                f"bias={config.bias!r} would train a packed layer's bias, which is fixed; use lora_bias=True"
            )
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Merge into a float layer; packed weights cannot take an addition."""
        check_merge(self.get_base_layer())
        super().merge(*args, **kwargs)


class PackedExperts(lora.ParamWrapper):
    """LoRA on one of the stacked weights that :class:`QuantExperts` stands for (PEFT's ``target_parameters``)."""

    def __init__(self, base_layer: Any, adapter_name: str, *args: Any, **kwargs: Any):
        if kwargs.get("parameter_name") is None:
            raise ValueError(
                "experts are adapted by their stacked weights: give LoraConfig "
                f"target_parameters={list(parameters_of(_experts(base_layer)))}, not target_modules"
            )
        super().__init__(base_layer, adapter_name, *args, **kwargs)
        _experts(base_layer).separate = True

    @property
    def _did_swap_in_out_features(self) -> bool:
        """Whether the stacked weight is [experts, out_features, in_features]."""
        return not getattr(self.get_base_layer(), "is_transposed", False)

    @_did_swap_in_out_features.setter
    def _did_swap_in_out_features(self, value: bool) -> None:
        """Ignored: the layer decides."""

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        self.num_experts, out_features, in_features = self.get_param().shape
        self._param_ndim = 3
        return in_features, out_features

    def get_param(self) -> torch.Tensor:
        """The stacked weight; while it is packed, a single value expanded to its shape [experts, out, in]."""
        experts = self.get_base_layer()
        if not isinstance(experts, QuantExperts):
            return super().get_param()
        down = self.parameter_name == "down_proj"
        specs = [experts.spec.of(name)[0] for name in experts.spec.names if (name == "down_proj") == down]
        shape = (experts.num_experts, sum(spec.out_features for spec in specs), specs[0].in_features)
        return torch.empty((), dtype=experts.dtype, device=home(experts)).expand(shape)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        """Add an adapter; one whose initialization changes the base layer's weight is refused."""
        _check_initialization(config)
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        experts = self.get_base_layer()
        if not isinstance(experts, QuantExperts):
            with super()._activate_lora(active_adapters):
                yield
            return
        adapters = [adapter for adapter in active_adapters if adapter in self.lora_A]

        def addition(expert: int, x: torch.Tensor) -> torch.Tensor:
            return sum((self._add(adapter, expert, x) for adapter in adapters), torch.zeros((), device=x.device))

        with experts.adding("down" if self.parameter_name == "down_proj" else "up", addition):
            yield

    def _add(self, adapter: str, expert: int, x: torch.Tensor) -> torch.Tensor:
        """What an adapter adds to one expert's output for ``x`` [tokens, in_features], as PEFT lays experts out."""
        down: Any = self.lora_A[adapter]
        up: Any = self.lora_B[adapter]
        a, b = down.weight, up.weight
        a = a.view(self.num_experts, -1, a.shape[1])[expert]
        b = b.view(b.shape[0], -1, self.num_experts)[:, :, expert]
        return x.to(a.dtype) @ a.T @ b.T * self.scaling[adapter]

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Merge into stacked float weights; packed ones cannot take an addition."""
        check_merge(self.get_base_layer())
        super().merge(*args, **kwargs)

    def unload_and_optionally_merge_module(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The experts without adapters, which can run in one kernel again."""
        base = super().unload_and_optionally_merge_module(*args, **kwargs)
        if isinstance(base, QuantExperts):
            base.separate = False
        return base


def parameters_of(experts: QuantExperts) -> tuple[str, str]:
    """The float model's names for its experts' stacked weights, in the order in which PEFT wraps them."""
    return ("gate_up_proj" if experts.spec.is_gated else "up_proj", "down_proj")


def wrapper_of(module: nn.Module, parameter: str) -> PackedExperts | None:
    """The wrapper of ``parameter`` among those that surround the experts, if there is one."""
    while isinstance(module, PackedExperts):
        if module.parameter_name == parameter:
            return module
        module = module.base_layer
    return None


def _experts(module: Any) -> Any:
    return module.get_base_layer() if isinstance(module, PackedExperts) else module


def _check_initialization(config: Any) -> None:
    how = config.init_lora_weights
    if how not in INITIALIZATIONS:
        raise ValueError(
            f"init_lora_weights={how!r} changes the weights of the base layer, and these are packed; "
            f"use one of {', '.join(map(repr, INITIALIZATIONS))}, or dequantize() the model first"
        )
