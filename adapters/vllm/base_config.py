"""What the layers of one model ask about its checkpoint, and tell about themselves."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

from graftq.adapters.serving.served_config import METHOD, ServedConfig
from graftq.adapters.vllm import stock
from graftq.plugin.checkpoint.configuration import QuantConfig
from graftq.plugin.checkpoint.source import Source

_QuantizationConfig: Any = stock.QuantizationConfig


class BaseConfig(ServedConfig, _QuantizationConfig):
    """The part of graftq's configuration that knows the checkpoint, and no layer."""

    engine = "vLLM"

    def __init__(self, config: QuantConfig):
        super().__init__(config)
        self._chosen = hashlib.sha256()

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Follow a model's renaming of modules."""
        self.stored.rename(hf_to_vllm_mapper.apply_list)

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Learn where the checkpoint is, and hold its other file of parameters against those that vLLM has read.

        Raises:
            CheckpointError: if that is damaged, or contradicts them.
        """
        self.locate(model_name, {} if revision is None else {"revision": revision})

    def hub_arguments(self) -> dict[str, Any]:
        """Where vLLM downloads to."""
        current = stock.get_current_vllm_config_or_none()
        folder = None if current is None else current.load_config.download_dir
        return {"cache_dir": folder} if folder else {}

    def remote_names(self, source: Source) -> Iterable[str]:
        """The names of a repository's tensors, asked as vLLM does it."""
        return stock.get_safetensors_params_metadata(source.name, revision=source.hub.get("revision"))

    @property
    def most_tokens(self) -> int:
        """Tokens of the largest batch that this engine computes at a time; 0 where no engine is being made."""
        current = stock.get_current_vllm_config_or_none()
        return 0 if current is None else int(current.scheduler_config.max_num_batched_tokens or 0)

    def remember(self, chosen: str) -> None:
        """Make what a layer has become part of the key under which vLLM caches compiled models.

        A model may be the same to vLLM, and another to its compiler: with another kernel, or q, k and v apart.
        """
        self._chosen.update(chosen.encode())
        current = stock.get_current_vllm_config_or_none()
        if current is not None and isinstance(current.additional_config, dict):
            current.additional_config[METHOD] = self._chosen.hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        # What is sent to workers has seen no layer yet; they look at the files themselves.
        return {name: value for name, value in vars(self).items() if name not in ("_chosen", "stored")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= {**state, "_chosen": hashlib.sha256()}
