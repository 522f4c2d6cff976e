"""The part of an engine's quantization configuration that knows the checkpoint, and no layer."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any, ClassVar

import torch

from graftq.adapters.serving.stored_modules import StoredModules
from graftq.plugin.checkpoint.configuration import QUANTIZE_CONFIG, QuantConfig
from graftq.plugin.checkpoint.json_files import read_object
from graftq.plugin.checkpoint.source import Source

METHOD = "graftq"
"""The name of our quantization method, as in ``quantization="graftq"``."""


class ServedConfig:
    """What the layers of one model ask about its checkpoint; to be mixed into the engine's base class.

    Attributes:
        engine: The engine's name, for messages.
        gptq: The GPTQ parameters.
    """

    engine: ClassVar[str]

    def __init__(self, config: QuantConfig):
        super().__init__()
        self.gptq = config
        self._where: tuple[str, dict[str, Any]] | None = None

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
        """Where an engine looks for parameters that ``config.json`` lacks, if asked for this method by name."""
        return [QUANTIZE_CONFIG]

    def locate(self, name: str, hub: dict[str, Any]) -> None:
        """Learn where the checkpoint is, and hold its other file of parameters against those that the engine has read.

        Args:
            name: A folder, or a repository of the Hub.
            hub: The arguments for the Hub that the engine was given.

        Raises:
            CheckpointError: if that file is damaged, or contradicts them.
        """
        self._where = (name, hub)
        source = Source(name, hub)
        if path := source.cached(QUANTIZE_CONFIG):
            where = source.describe(QUANTIZE_CONFIG)
            self.gptq = self.gptq.with_beside(QuantConfig.from_dict(read_object(path, where), where))

    @cached_property
    def stored(self) -> StoredModules:
        """What the checkpoint's files hold; looked at when the first layer is made."""
        if self._where is None:
            raise RuntimeError(f"{self.engine} has not said which checkpoint this configuration belongs to")
        name, hub = self._where
        return StoredModules(Source(name, {**hub, **self.hub_arguments()}), self.engine, self.remote_names)

    def hub_arguments(self) -> dict[str, Any]:
        """What the engine says about the Hub only once a model is being made."""
        return {}

    def remote_names(self, source: Source) -> Iterable[str]:
        """The names of a repository's tensors."""
        raise NotImplementedError

    @property
    def most_tokens(self) -> int:
        """Tokens of the largest batch that the engine computes at a time; 0 where that is not known."""
        return 0

    def remember(self, chosen: str) -> None:
        """Take note of what a layer has become; for engines that keep compiled models."""
