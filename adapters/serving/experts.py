"""An engine's method for the routed experts of a mixture-of-experts layer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from graftq.adapters.serving.projection_loader import ProjectionLoader, uncut
from graftq.adapters.serving.served_config import ServedConfig
from graftq.plugin.checkpoint.headers import SUFFIXES
from graftq.plugin.manager import choose_kernel
from graftq.quant_linear.activations import Activation
from graftq.quant_linear.errors import CheckpointError
from graftq.quant_linear.experts import QuantExpert, QuantExperts
from graftq.quant_linear.gpu.warmup import compile_kernels
from graftq.quant_linear.linear import QuantLinear
from graftq.quant_linear.sharding import shard_expert

NAMES = {"w1": ("w1", "gate_proj"), "w2": ("w2", "down_proj"), "w3": ("w3", "up_proj")}
"""The engines' names for an expert's projections, and what checkpoints call them."""


class PackedExpertsMethod:
    """What an engine calls for the quantized experts of one layer; to be mixed into the engine's base class.

    Args:
        config: The checkpoint's configuration.
        names: The stored names of the experts' projections, by number and name.
        base: What the engine's base class is made of.

    Attributes:
        is_gated: Whether an expert has a gate.
        has_bias: Whether its projections have biases.
        tp_rank: This process's number among those that share the experts' inner features.
        tp_size: How many these are.
    """

    is_gated: bool
    has_bias: bool
    tp_rank: int
    tp_size: int

    def __init__(self, config: ServedConfig, names: Mapping[tuple[int, str], str], *base: Any):
        super().__init__(*base)
        self.config = config
        self.names = names
        self.loaders: dict[tuple[int, str], ProjectionLoader] = {}
        self.hidden = self.intermediate = 0
        self.dtype = torch.get_default_dtype()
        self.device = torch.get_default_device()

    @abstractmethod
    def describe(self, layer: Any, extra: Mapping[str, Any]) -> Activation:
        """Set this class's attributes from the engine's layer.

        Returns:
            The experts' activation.

        Raises:
            NotImplementedError: if graftq does not know it.
        """

    @property
    @abstractmethod
    def top_k(self) -> int:
        """How many experts a token goes to."""

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
        self.activation = self.describe(layer, extra_weight_attrs)
        for name in _parameters():
            empty = nn.Parameter(torch.empty(0, dtype=torch.int32, device=self.device), requires_grad=False)
            loader = partial(self.load, layer, name.partition("_")[2])
            loader.supports_moe_loading = True  # type: ignore[attr-defined] # some of vLLM's models ask
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
            reason = f"graftq does not know {self.config.engine}'s shard {shard_id!r}"
            raise self.config.stored.explain(CheckpointError(reason, module=f"{layer.layer_name}.{expert_id}"))
        local = self.local(layer, expert_id)
        if local >= 0:
            if (local, shard_id) not in self.loaders:
                self.loaders[local, shard_id] = self._expect(self._name(layer, expert_id, shard_id), shard_id)
            try:
                self.loaders[local, shard_id].put(suffix, loaded_weight)
                self._cut(local)
            except CheckpointError as error:
                raise self.config.stored.explain(error) from error
        return local >= 0 if return_success else None

    def local(self, layer: Any, expert: int) -> int:
        """An expert's number on this rank; negative if it is another's."""
        return layer._map_global_expert_id_to_local_expert_id(expert)

    def _expect(self, module: str, shard: str) -> ProjectionLoader:
        inner = self.tp_size * self.intermediate
        k, n = (inner, self.hidden) if shard == "w2" else (self.hidden, inner)
        declared = self.config.gptq.for_module(module)
        return ProjectionLoader(module, declared, k, n, uncut, self.device, self.dtype, self.has_bias)

    def _cut(self, local: int) -> None:
        """Reduce an expert to this rank's share, once all of it is there: which inner features depends on ``w2``."""
        loaders = {shard: self.loaders.get((local, shard)) for shard in self._shards().values()}
        if self.tp_size == 1 or not all(loader is not None and loader.is_complete for loader in loaders.values()):
            return
        wholes = {shard: loader.shards()[0] for shard, loader in loaders.items() if loader is not None}
        start = self.tp_rank * self.intermediate
        parts = shard_expert(wholes, "w2", start, start + self.intermediate, keep_bias=self.tp_rank == 0)
        for shard, part in parts.items():
            self.loaders[local, shard].keep(part)

    def _name(self, layer: Any, expert: int, shard: str) -> str:
        """The stored name of a projection; where it is not known, the engine's name."""
        known = (self.names[expert, name] for name in NAMES[shard] if (expert, name) in self.names)
        return next(known, f"{layer.layer_name}.{expert}.{shard}")

    def _shards(self) -> dict[str, str]:
        """An expert's projections, and the engines' names for them."""
        if not self.is_gated:
            return {"up_proj": "w1", "down_proj": "w2"}
        return {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}

    def pack(self, layer: Any, local_experts: int, all_experts: int) -> None:
        """Check that every tensor has arrived, and build packed experts from them.

        Raises:
            CheckpointError: naming file, module and reason, if anything is missing or damaged.
        """
        if hasattr(layer, "graftq"):
            return
        self.config.stored.check()
        shards = self._shards()
        try:
            experts = [
                QuantExpert({name: self._linear(layer, e, shard, all_experts) for name, shard in shards.items()})
                for e in range(local_experts)
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

    def _linear(self, layer: Any, local: int, shard: str, all_experts: int) -> QuantLinear:
        found = self.loaders.get((local, shard))
        if found is None:
            ours = (e for e in range(all_experts) if self.local(layer, e) == local)
            module = self._name(layer, next(ours, local), shard)
            raise CheckpointError("no tensor in the checkpoint for this projection", module=module)
        ((tensors, spec),) = found.shards()
        return QuantLinear.from_tensors(spec, tensors, choose_kernel, self.dtype)

    def _call(self, packed: QuantExperts, tokens: int) -> torch.Tensor:
        """With what the engines' routers give: experts' numbers in int32, weights in float32."""
        x = torch.empty(tokens, self.hidden, dtype=self.dtype, device=self.device)
        chosen = torch.zeros(tokens, self.top_k, dtype=torch.int32, device=self.device)
        return packed(x, chosen, chosen.float())


def _parameters() -> list[str]:
    return [f"{name}_{suffix}" for name in ("w13", "w2") for suffix in SUFFIXES]
