"""What stands for "gptq" in transformers' registry: graftq's configuration class and quantizer, of any version."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from types import ModuleType
from typing import Any, ClassVar

from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import GPTQConfig as StockConfig

from graftq.adapters.transformers.loading import current
from graftq.plugin.patching import replace_item
from graftq.quant_linear.spec import QuantSpec


def register(module: ModuleType, quantizer: type[DeferringQuantizer]) -> None:
    """Put ``quantizer`` and :class:`GPTQConfig` in the stock classes' place in ``transformers.quantizers.auto``."""

    def replace_stock(stock: type[HfQuantizer]) -> type[HfQuantizer]:
        quantizer.stock = stock
        return quantizer

    replace_item(module.AUTO_QUANTIZER_MAPPING, "gptq", replace_stock)
    replace_item(module.AUTO_QUANTIZATION_CONFIG_MAPPING, "gptq", lambda stock: GPTQConfig)


class DeferringQuantizer(HfQuantizer):
    """Asked for a model that is yet to be quantized, it gives an instance of another class instead."""

    stock: ClassVar[type[HfQuantizer]]

    def __new__(cls, quantization_config: Any = None, **kwargs: Any) -> Any:
        """Defer unless the model is quantized; copying and unpickling pass no arguments."""
        if kwargs.get("pre_quantized", True):
            return super().__new__(cls)
        return cls.to_quantize(quantization_config, **kwargs)

    @classmethod
    def to_quantize(cls, quantization_config: Any, **kwargs: Any) -> HfQuantizer:
        """What quantizes a model: the stock class."""
        return cls.stock(quantization_config, **kwargs)


class GPTQConfig(StockConfig):
    """The stock configuration, without what only matters to quantizing; saved as it was read.

    Bears the stock name because transformers compares the names of the classes that it merges.
    """

    def __init__(self, bits: int, **kwargs: Any):
        self._read = {"bits": bits, **kwargs}
        self._method = "gptq"
        super().__init__(bits, **{key: value for key, value in kwargs.items() if value is not None})
        self.dynamic = kwargs.get("dynamic")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From the parameters of a checkpoint; what it was quantized with is kept, and means nothing for loading."""
        here = current()
        if here is None or here.config is None:
            return super().from_dict(config_dict, return_unused_kwargs, **kwargs)
        without_meaning = ("dataset", "tokenizer", "self")  # `self` is a name that no parameter can have
        known = {key: value for key, value in config_dict.items() if key not in without_meaning}
        made: Any = super().from_dict(known, return_unused_kwargs, **kwargs)
        config = made[0] if return_unused_kwargs else made
        config._read = {key: value for key, value in config_dict.items() if key != "quant_method"}
        config._method = here.config.method
        return made

    def to_dict(self) -> dict[str, Any]:
        """The parameters that were read, all of them and no others, unless this is to quantize."""
        if self.dataset is not None:
            whole = super().to_dict()
            del whole["_read"], whole["_method"]
            return whole
        read = {**copy.deepcopy(self._read), "quant_method": self._method}
        if "model_file_base_name" in read:
            read["model_file_base_name"] = "model"  # what transformers calls the weights that it saves
        read.pop("model_basename", None)
        return read

    def complete(self, specs: Iterable[QuantSpec]) -> None:
        """State what the files leave to be seen from their tensors, where all of them show the same."""
        specs = list(specs)
        seen: dict[str, set[Any]] = {
            "group_size": {-1 if spec.num_groups == 1 else spec.group_size for spec in specs},
            "desc_act": {any(spec.desc_act for spec in specs)},
            "sym": {all(spec.sym for spec in specs)},
        }
        for key, values in seen.items():
            if self._read.get(key) is None and len(values) == 1:
                self._read[key] = values.pop()
                setattr(self, key, self._read[key])

    def post_init(self) -> None:
        """Check what quantizing needs only if this is to quantize; loading is checked by :class:`QuantConfig`."""
        if self.dataset is not None:
            super().post_init()
        elif self.backend is None:
            self.backend = "auto"
