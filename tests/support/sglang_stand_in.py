"""Small stand-ins for the parts of SGLang that graftq's adapter touches, with the signatures of the real ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import nn

from support.stand_in import stand_in, these

LAYERS = "sglang.srt.layers"
QUANTIZATION = f"{LAYERS}.quantization"


class QuantizeMethodBase:
    """The base of all methods."""


class LinearMethodBase(QuantizeMethodBase):
    """The base of methods for linear layers."""


class FusedMoEMethodBase(QuantizeMethodBase):
    """The base of methods for experts."""

    runner = None


class UnquantizedLinearMethod(LinearMethodBase):
    """What plain layers get."""


class QuantizationConfig:
    """The base of all configurations."""

    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg: Mapping[str, Any], user_quant: str | None) -> str | None:
        """Take nothing."""
        return None


class GPTQMarlinConfig(QuantizationConfig):
    """SGLang's method on NVIDIA's GPUs."""

    @classmethod
    def is_gptq_marlin_compatible(cls, quant_config: Mapping[str, Any]) -> bool:
        """Four and eight bits, symmetric."""
        return (quant_config["bits"], quant_config["sym"]) in ((4, True), (8, True))

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg: Mapping[str, Any], user_quant: str | None) -> str | None:
        """Take what it can run."""
        mine = user_quant in (None, "gptq_marlin") and cls.is_gptq_marlin_compatible(hf_quant_cfg)
        return "gptq_marlin" if mine else None


class CPUGPTQConfig(QuantizationConfig):
    """SGLang's method on Intel's processors."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The parameters as they are."""
        return config


class Group(NamedTuple):
    """Processes that share layers."""

    rank_in_group: int
    world_size: int


class _Layer(nn.Module):
    """A layer as its method sees it: empty, with the group of its ranks."""

    def __init__(self, rank: int = 0, ranks: int = 1, **attributes: Any):
        super().__init__()
        self.tp_group = Group(rank, ranks) if ranks > 1 else None
        self.bias: torch.Tensor | None = None
        self.quant_method: Any = UnquantizedLinearMethod()
        vars(self).update(attributes)


class LinearBase(_Layer):
    """A linear layer."""


class ParallelLMHead(_Layer):
    """An output embedding."""


class FusedMoE(nn.Module):
    """The experts of a layer, of which this rank has some."""

    def __init__(self, prefix: str, experts: range, total: int, rank: int = 0, ranks: int = 1, **changes: Any):
        super().__init__()
        self.layer_name, self.layer_id = prefix, 0
        self.num_local_experts, self.num_experts = len(experts), total
        self.moe_tp_rank, self.moe_tp_size = rank, ranks
        self.uses_expert_location = True
        self.quant_method: Any = None
        self._experts = experts
        usual = {"activation": "silu", "is_gated": True, "top_k": 2, "num_fused_shared_experts": 0}
        usual |= dict.fromkeys(("gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit", "swiglu_limit"))
        usual |= {"apply_router_weight_on_input": False, "no_combine": False, "routed_scaling_factor": None}
        self.moe_runner_config = SimpleNamespace(**{**usual, **changes})

    def _map_global_expert_id_to_local_expert_id(self, expert_id: int) -> int:
        return expert_id - self._experts.start if expert_id in self._experts else -1


class StandardCombineInput(NamedTuple):
    """What experts give."""

    hidden_states: torch.Tensor


class HookRegistry:
    """Hooks on functions by their dotted names; kept here, not applied."""

    hooks: dict[str, tuple[Callable[..., Any], str]]

    @classmethod
    def register(cls, target: str, hook: Callable[..., Any], hook_type: str) -> None:
        """Take note of it."""
        assert target not in cls.hooks
        cls.hooks[target] = hook, hook_type


class HookType:
    """When hooks run."""

    AFTER = "after"
    AROUND = "around"


@contextmanager
def installed(version: str = "0.5.23", platform: str = "cuda", **server: Any) -> Iterator[SimpleNamespace]:
    """Make ``import sglang`` find the stand-ins, and graftq's adapter import anew; yields what is registered."""
    HookRegistry.hooks = {}
    methods: dict[str, type] = {"awq": QuantizationConfig, "gptq_marlin": GPTQMarlinConfig}
    on_cpus: dict[str, type] = {"gptq": CPUGPTQConfig}
    choices = ["gptq", "gptq_marlin"]
    experts = SimpleNamespace(metadata=None)
    backend = SimpleNamespace(is_none=lambda: True, is_auto=lambda: True)
    settings = SimpleNamespace(**{"enable_eplb": False, "chunked_prefill_size": 0, **server})

    def check_cpu_amx_support(config: Mapping[str, Any]) -> None:
        if config["bits"] != 4 or config["desc_act"]:
            raise ValueError

    contents: dict[str, dict[str, Any]] = {
        "sglang": {"__version__": version},
        "sglang.srt": {},
        "sglang.srt.server_args": {"add_quantization_method_choices": choices.extend},
        "sglang.srt.runtime_context": {"get_server_args": lambda: settings},
        "sglang.srt.utils": {
            **{f"is_{name}": lambda name=name: name == platform for name in ("cuda", "cpu", "hip")},
            "cpu_has_amx_support": lambda: platform == "cpu",
        },
        "sglang.srt.distributed": {},
        "sglang.srt.distributed.utils": {"get_group_rank_size": lambda group: group or (0, 1)},
        "sglang.srt.eplb": {},
        "sglang.srt.eplb.expert_location": {"get_global_expert_location_metadata": lambda: experts.metadata},
        "sglang.srt.plugins": {},
        "sglang.srt.plugins.hook_registry": these(HookRegistry, HookType),
        LAYERS: {},
        f"{LAYERS}.linear": these(LinearBase),
        f"{LAYERS}.vocab_parallel_embedding": these(ParallelLMHead),
        f"{LAYERS}.moe": {"get_moe_a2a_backend": lambda: backend, "get_moe_runner_backend": lambda: backend},
        f"{LAYERS}.moe.fused_moe_triton": these(FusedMoE),
        f"{LAYERS}.moe.token_dispatcher": these(StandardCombineInput),
        QUANTIZATION: {"QUANTIZATION_METHODS": methods, "CPU_QUANTIZATION_METHODS": on_cpus},
        f"{QUANTIZATION}.base_config": these(QuantizationConfig, LinearMethodBase, FusedMoEMethodBase),
        f"{QUANTIZATION}.unquant": these(UnquantizedLinearMethod),
        f"{QUANTIZATION}.gptq": these(GPTQMarlinConfig, CPUGPTQConfig),
        f"{QUANTIZATION}.gptq.schemes": {},
        f"{QUANTIZATION}.gptq.schemes.gptq_cpu": {"_check_cpu_amx_support": check_cpu_amx_support},
    }
    with stand_in(contents, "sglang"):
        yield SimpleNamespace(methods=methods, on_cpus=on_cpus, choices=choices, experts=experts)
