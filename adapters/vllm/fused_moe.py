"""vLLM's method for the routed experts of a mixture-of-experts layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from graftq.adapters.serving.experts import PackedExpertsMethod
from graftq.adapters.vllm import stock
from graftq.quant_linear.activations import Activation

ACTIVATIONS = {
    "silu": Activation("silu"),
    "gelu": Activation("gelu"),
    "gelu_tanh": Activation("gelu_tanh"),
    "relu2": Activation("relu2"),
    "swigluoai": Activation("swiglu_oai", alpha=1.702, limit=7.0),
}
"""By the value of vLLM's ``MoEActivation``, less ``_no_mul``, which stands for an expert without a gate."""


_FusedMoEMethodBase: Any = stock.FusedMoEMethodBase


class GraftqMoEMethod(PackedExpertsMethod, _FusedMoEMethodBase):
    """What vLLM calls for the quantized experts of one layer."""

    def describe(self, layer: Any, extra: Mapping[str, Any]) -> Activation:
        """Set what the loaders need to know of the layer, and say its activation."""
        self.is_gated, self.has_bias = layer.activation.is_gated, self.moe.has_bias
        parallel = self.moe.moe_parallel_config
        self.tp_rank, self.tp_size = parallel.tp_rank, parallel.tp_size
        return _activation(layer)

    @property
    def top_k(self) -> int:
        """How many experts a token goes to."""
        return self.moe.experts_per_token

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that every tensor has arrived, and build packed experts from them."""
        self.pack(layer, layer.local_num_experts, layer.global_num_experts)

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
