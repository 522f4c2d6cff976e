"""SGLang's method for the routed experts of a mixture-of-experts layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from graftq.adapters.serving.experts import PackedExpertsMethod
from graftq.adapters.sglang import stock
from graftq.adapters.sglang.reloading import refuse, refuse_to_reload
from graftq.quant_linear.activations import Activation

ACTIVATIONS = {"silu": Activation("silu"), "relu2": Activation("relu2")}
"""By SGLang's names. Its "gelu" is one function on GPUs and another on CPUs."""

VARIANTS = ("gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit", "swiglu_limit")
"""What turns the activation into another, if it is set."""

_FusedMoEMethodBase: Any = stock.FusedMoEMethodBase


class GraftqMoEMethod(PackedExpertsMethod, _FusedMoEMethodBase):
    """What SGLang calls for the quantized experts of one layer."""

    moe: Any

    def describe(self, layer: Any, extra: Mapping[str, Any]) -> Activation:
        """Set what the loaders need to know of the layer, and say its activation.

        Raises:
            NotImplementedError: for what graftq does not know, or does not do.
        """
        self.moe = layer.moe_runner_config
        self.is_gated, self.has_bias = self.moe.is_gated, bool(extra.get("with_bias"))
        self.tp_rank, self.tp_size = layer.moe_tp_rank, layer.moe_tp_size
        if why := self._refusal(layer):
            raise NotImplementedError(f"{layer.layer_name}: {why}")
        return ACTIVATIONS[self.moe.activation]

    def _refusal(self, layer: Any) -> str:
        variants = [name for name in VARIANTS if getattr(self.moe, name) is not None]
        if self.moe.activation not in ACTIVATIONS or variants:
            found = ", ".join([repr(self.moe.activation), *variants])
            return f"graftq does not know the experts' activation {found}"
        if self.moe.num_fused_shared_experts:
            return "graftq does not run shared experts among the others; start with --disable-shared-experts-fusion"
        if self.moe.no_combine:
            return "graftq does not leave the experts' outputs apart"
        if stock.get_server_args().enable_eplb:
            return "graftq does not balance the load of experts; leave --enable-eplb out"
        if not stock.get_moe_a2a_backend().is_none():
            return "graftq does not know this --moe-a2a-backend; leave it out"
        if not stock.get_moe_runner_backend().is_auto():
            return "graftq does not know this --moe-runner-backend; leave it out"
        return "graftq does not know this load_format of SGLang's" if self.device.type == "meta" else ""

    @property
    def top_k(self) -> int:
        """How many experts a token goes to."""
        return self.moe.top_k

    def local(self, layer: Any, expert: int) -> int:
        """An expert's number on this rank; negative if it is another's.

        Raises:
            NotImplementedError: if SGLang keeps experts elsewhere than in their order, or twice.
        """
        where = stock.get_global_expert_location_metadata() if layer.uses_expert_location else None
        if where is not None and where.logical_to_all_physical(layer.layer_id, expert) != [expert]:
            raise NotImplementedError(f"{layer.layer_name}: graftq does not balance the load of experts")
        return super().local(layer, expert)

    def create_moe_runner(self, layer: nn.Module, moe_runner_config: Any) -> None:
        """None of SGLang's: experts run by themselves, on standard top-k outputs with this rank's numbers."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that every tensor has arrived, and build packed experts from them.

        Raises:
            CheckpointError: naming file, module and reason, if anything is missing or damaged.
        """
        self.pack(layer, layer.num_local_experts, layer.num_experts)
        refuse_to_reload(layer.w2_qweight)

    def restore_weights_before_loading(self, layer: nn.Module) -> None:
        """Refuse other weights for a running engine."""
        refuse()

    def apply(self, layer: Any, dispatch_output: Any) -> Any:
        """``hidden_states`` [tokens, hidden], weights and ids [tokens, top_k]; this rank's part of the sum."""
        x = dispatch_output.hidden_states
        weights, ids = dispatch_output.topk_output.topk_weights, dispatch_output.topk_output.topk_ids
        if self.moe.apply_router_weight_on_input:
            x, weights = x * weights.to(x.dtype), torch.ones_like(weights)
        out = layer.graftq(x, ids, weights)
        # On NVIDIA's GPUs it is the experts' to apply, elsewhere the model's, as for the methods of SGLang.
        factor = self.moe.routed_scaling_factor
        if factor not in (None, 1.0) and stock.is_cuda():
            out = out * factor
        return stock.StandardCombineInput(hidden_states=out)
