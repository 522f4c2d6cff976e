"""vLLM's method for linear layers, including fused ones and the output embedding."""

from __future__ import annotations

from typing import Any

from graftq.adapters.serving.linear import PackedLinearMethod
from graftq.adapters.vllm import stock

_LinearMethodBase: Any = stock.LinearMethodBase


class GraftqLinearMethod(PackedLinearMethod, _LinearMethodBase):
    """What vLLM calls for one quantized linear layer."""

    def rank(self, layer: Any) -> int:
        """This process's number among those that share the layer."""
        return layer.tp_rank
