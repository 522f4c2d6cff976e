"""graftq's ``QuantizationConfig``: which checkpoints it takes, and which of their layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from graftq.adapters.serving.takeover import Takeover
from graftq.adapters.vllm import stock
from graftq.adapters.vllm.base_config import BaseConfig
from graftq.plugin import switches
from graftq.plugin.checkpoint.configuration import QuantConfig


class GraftqConfig(BaseConfig):
    """What vLLM asks of a quantization method; made for each checkpoint."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> GraftqConfig:
        """From the parameters as stored.

        Raises:
            CheckpointError: if they are not GPTQ's, or damaged.
        """
        return cls(QuantConfig.from_dict(config, "quantization_config"))

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: Mapping[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Take a checkpoint whose ``config.json`` says "gptq", or AutoRound's of that packing, by naming our method."""
        return TAKEOVER.method(hf_quant_cfg, user_quant)

    @staticmethod
    def get_checkpoint_weight_mapper() -> Any:
        """Nothing to rename; the inherited one drops ``g_idx``."""
        return stock.WeightsMapper()

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """Decide by the files whether a layer is quantized, whatever the model thinks."""
        from graftq.adapters.vllm.fused_moe import GraftqMoEMethod
        from graftq.adapters.vllm.linear import GraftqLinearMethod

        if self.stored.source.is_local:
            self.stored.check()
        if isinstance(layer, stock.RoutedExperts):
            experts = self.stored.experts(prefix)
            return GraftqMoEMethod(self, experts, layer.moe_config) if experts else None
        if not isinstance(layer, (stock.LinearBase, stock.ParallelLMHead)):
            return None
        fused = self.packed_modules_mapping.get(prefix.rpartition(".")[2], ())
        projections = self.stored.layer(prefix, fused)
        if projections:
            return GraftqLinearMethod(self, prefix, projections)
        return stock.UnquantizedLinearMethod() if isinstance(layer, stock.LinearBase) else None


def _refuse(raw: Mapping[str, Any]) -> None:
    stock.AutoGPTQLinearMethod(stock.AutoGPTQConfig.from_config(raw))


TAKEOVER = Takeover(switches.VLLM, "all", _refuse)
"""All GPTQ checkpoints, unless the user says otherwise."""
