"""Small stand-ins for the parts of vLLM that graftq's adapter touches, with the signatures of the real ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from support.stand_in import stand_in, these

QUANTIZATION = "vllm.model_executor.layers.quantization"


class WeightsMapper:
    """Renames nothing."""


class QuantizeMethodBase:
    """The base of all methods."""


class QuantizationConfig:
    """The base of all configurations."""

    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}


class LinearMethodBase(QuantizeMethodBase):
    """The base of methods for linear layers."""


class UnquantizedLinearMethod(LinearMethodBase):
    """What plain layers get."""


class FusedMoEMethodBase(QuantizeMethodBase):
    """The base of methods for experts."""

    def __init__(self, moe: Any):
        self.moe = moe


class _Layer(nn.Module):
    """A layer as its method sees it: empty, with this rank's number."""

    def __init__(self, rank: int = 0, **attributes: Any):
        super().__init__()
        self.tp_rank = rank
        self.bias: torch.Tensor | None = None
        vars(self).update(attributes)


class LinearBase(_Layer):
    """A linear layer."""


class ParallelLMHead(_Layer):
    """An output embedding."""


class RoutedExperts(nn.Module):
    """The experts of a layer, of which this rank has some."""

    def __init__(self, prefix: str, experts: range, total: int, rank: int = 0, ranks: int = 1):
        super().__init__()
        self.layer_name = prefix
        self.local_num_experts, self.global_num_experts = len(experts), total
        self.activation = SimpleNamespace(value="silu", is_gated=True)
        self.apply_router_weight_on_input = False
        self.expert_map = None
        if len(experts) < total:
            self.expert_map = torch.tensor([e - experts.start if e in experts else -1 for e in range(total)])
        parallel = SimpleNamespace(tp_rank=rank, tp_size=ranks)
        self.moe_config = SimpleNamespace(moe_parallel_config=parallel, has_bias=False)

    def _map_global_expert_id_to_local_expert_id(self, expert_id: int) -> int:
        return expert_id if self.expert_map is None else int(self.expert_map[expert_id])


class AutoGPTQConfig:
    """vLLM's own configuration for GPTQ, as picky as the real one since 0.30."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> AutoGPTQConfig:
        """Refuse what the real one refuses."""
        grouped_order = config["desc_act"] and config["group_size"] != -1
        if grouped_order or config["bits"] not in (4, 8) or not config["sym"]:
            raise ValueError("unsupported")
        return cls()


class AutoGPTQLinearMethod:
    """vLLM's own method for GPTQ."""

    def __init__(self, quant_config: AutoGPTQConfig):
        self.quant_config = quant_config


@contextmanager
def installed(version: str) -> Iterator[SimpleNamespace]:
    """Make ``import vllm`` find the stand-ins, and graftq's adapter import anew; yields what is registered."""
    registry: dict[str, type] = {}
    methods = ["gptq", "auto_gptq"]

    def register_quantization_config(name: str) -> Any:
        methods.append(name)
        return lambda config: registry.setdefault(name, config)

    contents: dict[str, dict[str, Any]] = {
        "vllm": {"__version__": version},
        "vllm.config": {"get_current_vllm_config_or_none": lambda: None},
        "vllm.model_executor": {},
        "vllm.model_executor.models": {},
        "vllm.model_executor.models.utils": {"WeightsMapper": WeightsMapper},
        "vllm.model_executor.layers": {},
        "vllm.model_executor.layers.linear": these(LinearBase, LinearMethodBase, UnquantizedLinearMethod),
        "vllm.model_executor.layers.fused_moe": these(RoutedExperts, FusedMoEMethodBase),
        "vllm.model_executor.layers.vocab_parallel_embedding": these(ParallelLMHead),
        QUANTIZATION: {
            "QUANTIZATION_METHODS": methods,
            "register_quantization_config": register_quantization_config,
        },
        f"{QUANTIZATION}.base_config": these(QuantizationConfig, QuantizeMethodBase),
        f"{QUANTIZATION}.auto_gptq": these(AutoGPTQConfig, AutoGPTQLinearMethod),
    }
    with stand_in(contents, "vllm"):
        yield SimpleNamespace(methods=methods, registry=registry)
