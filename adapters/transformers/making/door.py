"""The door in transformers: ``from_pretrained(..., quantization_config=GPTQConfig(dataset=...))``."""

from __future__ import annotations

import logging
from typing import Any

from transformers.quantizers.base import HfQuantizer

from graftq.adapters.transformers.extra_parameters import EXTRA
from graftq.adapters.transformers.making.calibration import token_rows
from graftq.adapters.transformers.making.datasets import named_texts
from graftq.adapters.transformers.making.model import quantize_model
from graftq.adapters.transformers.making.options import Options
from graftq.adapters.transformers.making.packing import pack_model
from graftq.adapters.transformers.making.progress import Progress
from graftq.adapters.transformers.making.report import worst

logger = logging.getLogger("graftq")

LONGEST = 2048
"""Tokens of a calibration row, where the model takes so many and the caller says nothing."""


class MakingQuantizer(HfQuantizer):
    """Loads a float model as it is, then quantizes it."""

    requires_calibration = False

    def __init__(self, quantization_config: Any, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.options = options_of(quantization_config)
        if quantization_config.dataset is None:
            raise ValueError(
                "this model is not quantized, and GPTQConfig has no `dataset` to quantize it with: pass a list of texts"
            )

    def update_device_map(self, device_map: Any) -> Any:
        """The CPU, unless the caller says otherwise."""
        return {"": "cpu"} if device_map is None else device_map

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        parameters: Any = self.quantization_config
        make(model, parameters.dataset, parameters.tokenizer, self.options, parameters.model_seqlen)
        return model

    def is_serializable(self) -> bool:
        """The packed model is."""
        return True

    @property
    def is_trainable(self) -> bool:
        """As of any packed model."""
        return True


def make(
    model: Any, dataset: Any, tokenizer: Any, options: Options, longest: int | None = None, limit: int | None = None
) -> None:
    """Quantize a float model with texts (or a data set's name), and pack it in place.

    Args:
        model: The model.
        dataset: As for :func:`token_rows`, or "wikitext2", "c4" or "c4-new".
        tokenizer: A tokenizer, or where to load one; None for the model's own.
        options: How.
        longest: Tokens of a row.
        limit: Tokens in all.
    """
    if tokenizer is None:
        tokenizer = model.name_or_path or None
    if isinstance(dataset, str):
        dataset = named_texts(dataset)
    most = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or LONGEST
    rows = token_rows(dataset, tokenizer, min(longest or LONGEST, most), limit)
    with Progress() as progress:
        result = quantize_model(model, rows, options, progress.step)
    pack_model(model, result)
    logger.info("quantized %d projections\n%s", len(result.made), worst(result.rows))
    model.quantize_report = result.rows


def options_of(config: Any) -> Options:
    """The options that a ``GPTQConfig`` of transformers states.

    Raises:
        ValueError: for what graftq does not make.
    """
    stated = config.format or "gptq"
    if stated != "gptq":
        raise ValueError(f"format={stated!r}: graftq writes 'gptq', which every loader reads")
    modules = config.modules_in_block_to_quantize
    if modules is not None:
        modules = tuple(name for entry in modules for name in ([entry] if isinstance(entry, str) else entry))
    return Options(
        bits=config.bits,
        group_size=config.group_size,
        sym=config.sym,
        desc_act=config.desc_act,
        **{name: getattr(config, name) for name in EXTRA if hasattr(config, name)},
        act_group_aware=config.act_group_aware or config.desc_act,
        damp_percent=config.damp_percent,
        true_sequential=config.true_sequential,
        blocks=config.block_name_to_quantize,
        meta=config.meta,
        modules=modules,
        batch_size=config.batch_size,
    )
