"""graftq's ``QuantizationConfig``: which checkpoints it takes, and which of their layers."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from graftq.adapters.vllm import METHOD, versions
from graftq.adapters.vllm.stored import Stored
from graftq.plugin import switches
from graftq.plugin.config import QUANTIZE_CONFIG, ZERO_OFFSETS, QuantConfig
from graftq.plugin.source import Source

logger = logging.getLogger("graftq")

OURS_TO_TAKE = (None, METHOD, "gptq")
"""Values of vLLM's ``quantization`` argument that leave the choice to us; the others name an implementation."""


class GraftqConfig(QuantizationConfig):
    """The GPTQ parameters of one checkpoint, and the names of its quantised modules."""

    def __init__(self, config: QuantConfig):
        super().__init__()
        self.gptq = config
        self._where: tuple[str, dict[str, Any]] | None = None
        self._chosen = hashlib.sha256()

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
        """Take a checkpoint whose ``config.json`` says "gptq", by naming our method."""
        if str(hf_quant_cfg.get("quant_method", "")).lower() != "gptq" or user_quant not in OURS_TO_TAKE:
            return None
        if user_quant == METHOD:
            return METHOD
        layout = str(hf_quant_cfg.get("checkpoint_format") or hf_quant_cfg.get("format") or "gptq").lower()
        if layout not in ZERO_OFFSETS:
            return None
        if _only_unsupported() and _stock_takes(hf_quant_cfg):
            return None
        return METHOD

    @staticmethod
    def get_checkpoint_weight_mapper() -> Any:
        """Nothing to rename; the inherited one drops ``g_idx``."""
        from vllm.model_executor.models.utils import WeightsMapper

        return WeightsMapper()

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Follow a model's renaming of modules."""
        self.stored.rename(hf_to_vllm_mapper.apply_list)

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Learn where the checkpoint is."""
        self._where = (model_name, {} if revision is None else {"revision": revision})

    @cached_property
    def stored(self) -> Stored:
        """What the checkpoint's files hold; looked at when the first layer is made."""
        from vllm.config import get_current_vllm_config_or_none

        if self._where is None:
            raise RuntimeError("vLLM has not said which checkpoint this configuration belongs to")
        name, hub = self._where
        current = get_current_vllm_config_or_none()
        if current is not None and current.load_config.download_dir:
            hub = {**hub, "cache_dir": current.load_config.download_dir}
        return Stored(Source(name, hub))

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Decide by the files whether a layer is quantised, whatever the model thinks."""
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        from graftq.adapters.vllm.linear import GraftqLinearMethod
        from graftq.adapters.vllm.moe import GraftqMoEMethod

        if isinstance(layer, RoutedExperts):
            experts = self.stored.experts(prefix)
            return GraftqMoEMethod(self, layer.moe_config, experts) if experts else None
        if not isinstance(layer, (LinearBase, ParallelLMHead)):
            return None
        fused = self.packed_modules_mapping.get(prefix.rpartition(".")[2], ())
        names = self.stored.layer(prefix, fused)
        if names:
            return GraftqLinearMethod(self, prefix, names)
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None

    def remember(self, chosen: str) -> None:
        """Make what a layer has become part of the key under which vLLM caches compiled models.

        A model may be the same to vLLM, and another to its compiler: with another kernel, or q, k and v apart.
        """
        from vllm.config import get_current_vllm_config_or_none

        self._chosen.update(chosen.encode())
        current = get_current_vllm_config_or_none()
        if current is not None and isinstance(current.additional_config, dict):
            current.additional_config[METHOD] = self._chosen.hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        # What is sent to workers has seen no layer yet; they look at the files themselves.
        return {name: value for name, value in vars(self).items() if name not in ("_chosen", "stored")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= {**state, "_chosen": hashlib.sha256()}


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
            versions.stock_linear_method()(versions.stock_config().from_config(merged))
    except Exception:  # whatever vLLM raises, it is a refusal
        return False
    return True
