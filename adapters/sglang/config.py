"""graftq's ``QuantizationConfig`` for SGLang: which checkpoints it takes, and which of their layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from graftq.adapters.serving.served_config import ServedConfig
from graftq.adapters.serving.takeover import Takeover
from graftq.adapters.sglang import stock
from graftq.plugin import switches
from graftq.plugin.checkpoint.configuration import QuantConfig
from graftq.plugin.checkpoint.source import Source

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
"""What SGLang fuses in all of its models; most of them do not say so."""

ADDED = ("packed_modules_mapping", "hf_config", "requantization_method")
"""What SGLang adds to the parameters of the checkpoint."""

_QuantizationConfig: Any = stock.QuantizationConfig


class GraftqConfig(ServedConfig, _QuantizationConfig):
    """What SGLang asks of a quantization method; made for each checkpoint.

    Attributes:
        claimed: The stored names of all modules that have got a layer.
    """

    engine = "SGLang"

    def __init__(self, config: QuantConfig):
        super().__init__(config)
        self.claimed: set[str] = set()

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> GraftqConfig:
        """From the parameters as stored, and what SGLang has added to them.

        Raises:
            CheckpointError: if they are not GPTQ's, or damaged.
        """
        stored = {key: value for key, value in config.items() if key not in ADDED}
        made = cls(QuantConfig.from_dict(stored, "quantization_config"))
        made.packed_modules_mapping = config.get("packed_modules_mapping") or {}
        return made

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg: Mapping[str, Any], user_quant: str | None) -> str | None:
        """Take a checkpoint whose ``config.json`` says "gptq", or AutoRound's of that packing, by naming our method."""
        return TAKEOVER.method(hf_quant_cfg, user_quant)

    def get_scaled_act_names(self) -> list[str]:
        """No activation function is scaled after the fact; that is AWQ's."""
        return []

    def apply_weight_name_mapper(self, hf_to_sglang_mapper: Any) -> None:
        """Follow a model's renaming of modules."""
        self.stored.rename(hf_to_sglang_mapper.apply_list)

    def remote_names(self, source: Source) -> Iterable[str]:
        """The names of a repository's tensors; of those in safetensors, since others say it in no header."""
        from huggingface_hub import get_safetensors_metadata

        if self.stored.index.tensors:
            return self.stored.index.tensors
        return get_safetensors_metadata(source.name, revision=source.hub.get("revision")).weight_map

    @property
    def most_tokens(self) -> int:
        """Tokens of the largest batch that this engine computes at a time; 0 where no engine is being made."""
        try:
            arguments = stock.get_server_args()
        except ValueError:
            return 0
        return max(int(getattr(arguments, "chunked_prefill_size", None) or 0), 0)

    def projections(self, prefix: str) -> list[str]:
        """The stored names of a linear layer's projections; empty if it is not quantized.

        Raises:
            CheckpointError: if only some of them are quantized.
        """
        own = prefix.rpartition(".")[2]
        parts = self.packed_modules_mapping.get(own) or FUSED.get(own, ())
        return self.stored.layer(prefix, parts)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """Decide by the files whether a layer is quantized, whatever the model thinks."""
        from graftq.adapters.sglang.fused_moe import GraftqMoEMethod
        from graftq.adapters.sglang.linear import GraftqLinearMethod

        if self.stored.source.is_local:
            self.stored.check()
        if isinstance(layer, stock.FusedMoE):
            experts = self.stored.experts(prefix)
            self.claimed.update(experts.values())
            return GraftqMoEMethod(self, experts) if experts else None
        if not isinstance(layer, (stock.LinearBase, stock.ParallelLMHead)):
            return None
        projections = self.projections(prefix)
        self.claimed.update(projections)
        if projections:
            return GraftqLinearMethod(self, prefix, projections)
        return stock.UnquantizedLinearMethod() if isinstance(layer, stock.LinearBase) else None

    @staticmethod
    def is_ours(method: Any) -> bool:
        """Whether a layer's method is one of graftq's."""
        from graftq.adapters.sglang.fused_moe import GraftqMoEMethod
        from graftq.adapters.sglang.linear import GraftqLinearMethod

        return isinstance(method, (GraftqMoEMethod, GraftqLinearMethod))


def _refuse(raw: Mapping[str, Any]) -> None:
    """Raise for what SGLang's own methods do not run on this machine."""
    if stock.is_cuda() and stock.GPTQMarlinConfig.is_gptq_marlin_compatible(raw):
        return
    if not stock.is_cpu() or not stock.cpu_has_amx_support():
        raise ValueError("SGLang has no GPTQ kernel here")
    stock._check_cpu_amx_support(stock.CPUGPTQConfig.from_config(raw))


TAKEOVER = Takeover(switches.SGLANG, "", _refuse)
"""No checkpoint, unless the user says so."""
