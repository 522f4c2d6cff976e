"""``BaseQuantizeConfig``: the parameters of a checkpoint as programs for AutoGPTQ read, make and pass them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from graftq.plugin.checkpoint.configuration import QUANTIZE_CONFIG, QuantConfig, read_written
from graftq.plugin.checkpoint.source import HUB_ARGUMENTS, Source

# What AutoAWQ calls them; AutoGPTQ reads both.
_SYNONYMS = {"w_bit": "bits", "q_group_size": "group_size"}


@dataclass
class BaseQuantizeConfig:
    """Quantization parameters, with AutoGPTQ's names and defaults.

    Raises:
        graftq.quant_linear.errors.CheckpointError: a ``ValueError``, for values that GPTQ does not have.
    """

    bits: int = 4
    group_size: int = -1
    damp_percent: float = 0.01
    desc_act: bool = True
    static_groups: bool = False
    sym: bool = True
    true_sequential: bool = True
    quant_method: str = "gptq"
    checkpoint_format: str = "gptq"
    model_name_or_path: str | None = None
    model_file_base_name: str | None = None

    def __post_init__(self) -> None:
        QuantConfig.from_dict(asdict(self), "BaseQuantizeConfig")

    @classmethod
    def from_quant_config(
        cls, quantize_cfg: Mapping[str, Any], checkpoint_format: str | None = None, source: str = "quantize_config"
    ) -> BaseQuantizeConfig:
        """Read a dictionary in the form of ``quantize_config.json``; what AutoGPTQ does not know is left out.

        Args:
            quantize_cfg: The dictionary.
            checkpoint_format: The format, where the dictionary does not name it.
            source: What errors call the dictionary.

        Raises:
            ValueError: if ``checkpoint_format`` contradicts the dictionary, or for values that GPTQ does not have.
        """
        raw = {_SYNONYMS.get(key.lower(), key.lower()): value for key, value in quantize_cfg.items()}
        if checkpoint_format is not None:
            named = raw.setdefault("checkpoint_format", checkpoint_format)
            if named != checkpoint_format:
                raise ValueError(f"checkpoint_format={checkpoint_format!r}, but {source} says {named!r}")
        checked = QuantConfig.from_dict(raw, source)
        known = {field.name for field in fields(cls)} - {"quant_method", "checkpoint_format"}
        found = {key: value for key, value in raw.items() if key in known and value is not None}
        return cls(**found, checkpoint_format=checked.format)

    @classmethod
    def from_pretrained(cls, save_dir: str | Path, **kwargs: Any) -> BaseQuantizeConfig:
        """Read ``config.json``'s ``quantization_config`` and ``quantize_config.json``, which adds what that lacks.

        Args:
            save_dir: A folder, or a repository of the Hub.
            **kwargs: ``revision``, ``subfolder``, ``cache_dir``, ``token`` and other arguments for the Hub;
                ``checkpoint_format`` as in :meth:`from_quant_config`.

        Raises:
            ValueError: if there are no parameters, or not GPTQ's.
        """
        hub = {key: kwargs[key] for key in HUB_ARGUMENTS if kwargs.get(key) is not None}
        source = Source(str(save_dir), hub)
        written = read_written(source)
        if not written:
            raise ValueError(
                f"{source.name}: neither {QUANTIZE_CONFIG} nor a quantization_config in config.json: "
                "this is no quantized checkpoint, or one that has lost its parameters (pass quantize_config=)"
            )
        where = source.describe(next(iter(written)))
        raw = {key: value for each in reversed(written.values()) for key, value in each.items() if value is not None}
        config = cls.from_quant_config(raw, kwargs.get("checkpoint_format"), where)
        config.model_name_or_path = str(save_dir)
        return config

    def to_dict(self) -> dict[str, Any]:
        """The fields, as ``quantize_config.json`` holds them."""
        return asdict(self)

    def save_pretrained(self, save_dir: str | Path, **kwargs: Any) -> None:
        """Write ``quantize_config.json`` into a folder."""
        text = json.dumps(self.to_dict(), indent=2)
        Path(save_dir, QUANTIZE_CONFIG).write_text(text, encoding="utf-8")
