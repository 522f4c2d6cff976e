"""graftq's ``QuantizationConfig``: which checkpoints it takes, and which of their layers."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from graftq.adapters.vllm import stock
from graftq.adapters.vllm.base_config import METHOD, BaseConfig
from graftq.plugin import switches
from graftq.plugin.checkpoint import auto_round
from graftq.plugin.checkpoint.configuration import QUANTIZE_CONFIG, ZERO_OFFSETS, QuantConfig

logger = logging.getLogger("graftq")

OURS_TO_TAKE = (None, METHOD, "gptq")
"""Values of vLLM's ``quantization`` argument that leave the choice to us; the others name an implementation."""


class GraftqConfig(BaseConfig):
    """What vLLM asks of a quantization method; made for each checkpoint."""

    @classmethod
    def get_name(cls) -> str:
        """As in ``quantization="graftq"``."""
        return METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """All that kernels are judged for."""
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Any GPU: where no kernel runs, the reference does."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Where vLLM looks for parameters that ``config.json`` lacks, if asked for this method by name."""
        return [QUANTIZE_CONFIG]

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
        method = str(hf_quant_cfg.get("quant_method", "")).lower()
        if user_quant not in OURS_TO_TAKE or method not in ("gptq", *auto_round.SPELLINGS):
            return None
        if user_quant == METHOD:
            return METHOD
        if method != "gptq":
            return _take_auto_round(hf_quant_cfg)
        layout = str(hf_quant_cfg.get("checkpoint_format") or hf_quant_cfg.get("format") or "gptq").lower()
        if layout not in ZERO_OFFSETS:
            return None
        if _only_unsupported() and _stock_takes(hf_quant_cfg):
            return None
        return METHOD

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
            return GraftqMoEMethod(self, layer.moe_config, experts) if experts else None
        if not isinstance(layer, (stock.LinearBase, stock.ParallelLMHead)):
            return None
        fused = self.packed_modules_mapping.get(prefix.rpartition(".")[2], ())
        projections = self.stored.layer(prefix, fused)
        if projections:
            return GraftqLinearMethod(self, prefix, projections)
        return stock.UnquantizedLinearMethod() if isinstance(layer, stock.LinearBase) else None


def _take_auto_round(raw: Mapping[str, Any]) -> str | None:
    where = "quantization_config"
    if auto_round.refusal(raw, where) is not None:
        return None
    if _only_unsupported():
        modules = (raw.get("extra_config") or {}).items()
        quantized = [own for _, own in modules if int(own.get("bits", 0)) < auto_round.UNQUANTIZED]
        gptq = auto_round.as_gptq(raw, where)
        takes_all = all(_stock_takes({"desc_act": False, "sym": True, **gptq, **own}) for own in [{}, *quantized])
        if takes_all and gptq["checkpoint_format"] == "gptq":
            return None
    return METHOD


def _only_unsupported() -> bool:
    value = os.environ.get(switches.VLLM, "").lower()
    if value not in ("", "all", "unsupported"):
        logger.warning("graftq: %s=%s means nothing; it is 'all' or 'unsupported'. Taking all.", switches.VLLM, value)
    return value == "unsupported"


def _stock_takes(raw: Mapping[str, Any]) -> bool:
    """Whether vLLM's own GPTQ method accepts these parameters, each rule of ``dynamic`` included."""
    rules = (raw.get("dynamic") or {}).items()
    overrides = [rule for pattern, rule in rules if not pattern.startswith("-:")]
    try:
        for rule in [{}, *overrides]:
            merged = {**raw, "dynamic": {}, **rule}
            stock.AutoGPTQLinearMethod(stock.AutoGPTQConfig.from_config(merged))  # raises for what it does not take
    except Exception:  # whatever vLLM raises, it is a refusal
        return False
    return True
