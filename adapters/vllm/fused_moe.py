"""vLLM's method for the routed experts of a mixture-of-experts layer."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from graftq.adapters.vllm import stock
from graftq.adapters.vllm.base_config import BaseConfig
from graftq.adapters.vllm.projection_loader import ProjectionLoader, uncut
from graftq.plugin.checkpoint.headers import SUFFIXES
from graftq.plugin.manager import choose_kernel
from graftq.quant_linear.activations import Activation
from graftq.quant_linear.errors import CheckpointError
from graftq.quant_linear.experts import QuantExpert, QuantExperts
from graftq.quant_linear.gpu.warmup import compile_kernels
from graftq.quant_linear.linear import QuantLinear
from graftq.quant_linear.sharding import shard_expert

NAMES = {"w1": ("w1", "gate_proj"), "w2": ("w2", "down_proj"), "w3": ("w3", "up_proj")}
"""vLLM's names for an expert's projections, and what checkpoints call them."""

ACTIVATIONS = {
    "silu": Activation("silu"),
    "gelu": Activation("gelu"),
    "gelu_tanh": Activation("gelu_tanh"),
    "relu2": Activation("relu2"),
    "swigluoai": Activation("swiglu_oai", alpha=1.702, limit=7.0),
}
"""By the value of vLLM's ``MoEActivation``, less ``_no_mul``, which stands for an expert without a gate."""


_FusedMoEMethodBase: Any = stock.FusedMoEMethodBase


class GraftqMoEMethod(_FusedMoEMethodBase):
    """What vLLM calls for the quantized experts of one layer.

    Args:
        config: The checkpoint's configuration.
        moe: vLLM's description of the layer.
        names: The stored names of the experts' projections, by number and name.
    """

    def __init__(self, config: BaseConfig, moe: Any, names: Mapping[tuple[int, str], str]):
        super().__init__(moe)
        self.config = config
        self.names = names
        self.loaders: dict[tuple[int, str], ProjectionLoader] = {}
        self.hidden = self.intermediate = 0
        self.dtype = torch.get_default_dtype()
        self.device = torch.get_default_device()

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register empty parameters whose loaders collect the tensors, whatever their shape."""
        self.hidden, self.intermediate, self.dtype = hidden_size, intermediate_size_per_partition, params_dtype
        self.activation = _activation(layer)
        for name in _parameters():
            empty = nn.Parameter(torch.empty(0, dtype=torch.int32, device=self.device), requires_grad=False)
            loader = partial(self.load, layer, name.partition("_")[2])
            loader.supports_moe_loading = True  # type: ignore[attr-defined] # some models ask
            empty.weight_loader = loader  # type: ignore[attr-defined]
            layer.register_parameter(name, empty)

    def load(
        self,
        layer: Any,
        suffix: str,
        param: nn.Parameter,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        """Take one whole tensor of one expert; those of other ranks' experts are skipped.

        Raises:
            CheckpointError: naming file, module and reason, if it completes a projection that is damaged.
        """
        if shard_id not in NAMES:  # GPT-OSS's own, for experts that are fused in the files
            reason = f"graftq does not know vLLM's shard {shard_id!r}"
            raise self.config.stored.explain(CheckpointError(reason, module=f"{layer.layer_name}.{expert_id}"))
        local = _local(layer, expert_id)
        if local >= 0:
            if (local, shard_id) not in self.loaders:
                self.loaders[local, shard_id] = self._expect(self._name(layer, expert_id, shard_id), shard_id)
            try:
                self.loaders[local, shard_id].put(suffix, loaded_weight)
                self._cut(layer, local)
            except CheckpointError as error:
                raise self.config.stored.explain(error) from error
        return local >= 0 if return_success else None

    def _expect(self, module: str, shard: str) -> ProjectionLoader:
        inner = self.moe.moe_parallel_config.tp_size * self.intermediate
        k, n = (inner, self.hidden) if shard == "w2" else (self.hidden, inner)
        declared = self.config.gptq.for_module(module)
        return ProjectionLoader(module, declared, k, n, uncut, self.device, self.dtype, self.moe.has_bias)

    def _cut(self, layer: Any, local: int) -> None:
        """Reduce an expert to this rank's share, once all of it is there: which inner features depends on ``w2``."""
        parallel = self.moe.moe_parallel_config
        loaders = {shard: self.loaders.get((local, shard)) for shard in _shards(layer).values()}
        if parallel.tp_size == 1 or not all(loader is not None and loader.is_complete for loader in loaders.values()):
            return
        wholes = {shard: loader.shards()[0] for shard, loader in loaders.items() if loader is not None}
        start = parallel.tp_rank * self.intermediate
        parts = shard_expert(wholes, "w2", start, start + self.intermediate, keep_bias=parallel.tp_rank == 0)
        for shard, part in parts.items():
            self.loaders[local, shard].keep(part)

    def _name(self, layer: Any, expert: int, shard: str) -> str:
        """The stored name of a projection; where it is not known, vLLM's name."""
        known = (self.names[expert, name] for name in NAMES[shard] if (expert, name) in self.names)
        return next(known, f"{layer.layer_name}.{expert}.{shard}")

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that every tensor has arrived, and build packed experts from them.

        Raises:
            CheckpointError: naming file, module and reason, if anything is missing or damaged.
        """
        if hasattr(layer, "graftq"):
            return
        self.config.stored.check()
        shards = _shards(layer)
        try:
            experts = [
                QuantExpert({name: self._linear(layer, expert, shard) for name, shard in shards.items()})
                for expert in range(layer.local_num_experts)
            ]
        except CheckpointError as error:
            raise self.config.stored.explain(error) from error
        self.loaders = {}
        packed = QuantExperts(experts, choose_kernel, self.activation)
        packed.bind(self.device.type, self.dtype)
        compile_kernels(packed, partial(self._call, packed), self.config.most_tokens)
        for name in _parameters():
            if name != "w2_qweight":  # LoRA reads the device from it
                delattr(layer, name)
        layer.graftq = packed
        self.config.remember(f"{layer.layer_name}: {packed}")

    def _linear(self, layer: Any, local: int, shard: str) -> QuantLinear:
        found = self.loaders.get((local, shard))
        if found is None:
            ours = (e for e in range(layer.global_num_experts) if _local(layer, e) == local)
            module = self._name(layer, next(ours, local), shard)
            raise CheckpointError("no tensor in the checkpoint for this projection", module=module)
        ((tensors, spec),) = found.shards()
        return QuantLinear.from_tensors(spec, tensors, choose_kernel, self.dtype)

    def _call(self, packed: QuantExperts, tokens: int) -> torch.Tensor:
        """With what vLLM's routers give: experts' numbers in int32, weights in float32."""
        x = torch.empty(tokens, self.hidden, dtype=self.dtype, device=self.device)
        chosen = torch.zeros(tokens, self.moe.experts_per_token, dtype=torch.int32, device=self.device)
        return packed(x, chosen, chosen.float())

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """None: vLLM's own kernels are not used."""
        return None

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any = None,
        shared_experts_input: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``x`` [tokens, hidden], weights and ids [tokens, top_k]; this rank's part of the sum, [tokens, hidden]."""
        if layer.apply_router_weight_on_input:
            x, topk_weights = x * topk_weights.to(x.dtype), torch.ones_like(topk_weights)
        if layer.expert_map is not None:  # other ranks' experts become -1, and add nothing
            topk_ids = layer.expert_map[topk_ids.long()]
        if torch.compiler.is_compiling():  # on CPUs, where vLLM has no operator of its own around this call
            return torch.ops.graftq.vllm_experts(x, topk_ids, topk_weights, layer.layer_name)
        return layer.graftq(x, topk_ids, topk_weights)


def _local(layer: Any, expert: int) -> int:
    """An expert's number on this rank; negative if it is another's."""
    return layer._map_global_expert_id_to_local_expert_id(expert)


def _shards(layer: Any) -> dict[str, str]:
    """An expert's projections, and vLLM's names for them."""
    if not layer.activation.is_gated:
        return {"up_proj": "w1", "down_proj": "w2"}
    return {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def _parameters() -> list[str]:
    return [f"{name}_{suffix}" for name in ("w13", "w2") for suffix in SUFFIXES]


def _activation(layer: Any) -> Activation:
    """vLLM's name for it, as ours.

    Raises:
        NotImplementedError: for one that graftq does not know.
    """
    name = layer.activation.value
    known = ACTIVATIONS.get(name.removesuffix("_no_mul"))
    if known is None or (getattr(layer, "swiglu_limit", None) is not None and known.name != "swiglu_oai"):
        raise NotImplementedError(f"{layer.layer_name}: graftq does not know the experts' activation {name!r}")
    return known


def _run_by_name(x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, layer_name: str) -> torch.Tensor:
    runner = stock.get_forward_context().no_compile_layers[layer_name]
    return runner.routed_experts.graftq(x, topk_ids, topk_weights)


_library = torch.library.Library("graftq", "FRAGMENT")
_library.define("vllm_experts(Tensor x, Tensor topk_ids, Tensor topk_weights, str layer_name) -> Tensor")
_library.impl("vllm_experts", _run_by_name, "CompositeExplicitAutograd")


@torch.library.register_fake("graftq::vllm_experts", lib=_library)
def _(x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, layer_name: str) -> torch.Tensor:
    return torch.empty_like(x)
