"""SGLang's method for linear layers, including fused ones and the output embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from graftq.adapters.serving.linear import PackedLinearMethod
from graftq.adapters.sglang import stock
from graftq.adapters.sglang.reloading import refuse, refuse_to_reload

_LinearMethodBase: Any = stock.LinearMethodBase


class GraftqLinearMethod(PackedLinearMethod, _LinearMethodBase):
    """What SGLang calls for one quantized linear layer."""

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register empty parameters whose loaders collect the tensors, whatever their shape.

        Raises:
            NotImplementedError: if the model is made without memory, to be filled layer by layer.
        """
        if self.device.type == "meta":
            raise NotImplementedError(f"{self.prefix}: graftq does not know this load_format of SGLang's")
        super().create_weights(
            layer, input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype
        )

    def rank(self, layer: Any) -> int:
        """This process's number among those that share the layer."""
        return stock.get_group_rank_size(layer.tp_group)[0]

    def places(self, layer: Any, sizes: Sequence[int], output_size: int) -> list[tuple[int, int]]:
        """As for every engine; keys and values may be shared among other processes than queries."""
        places = super().places(layer, sizes, output_size)
        other = getattr(layer, "kv_tp_group", None)
        if other is not None and other is not layer.tp_group:
            places[1:] = [stock.get_group_rank_size(other)] * (len(sizes) - 1)
        return places

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that every tensor has arrived, and build packed layers from them.

        Raises:
            CheckpointError: naming file, module and reason, if anything is missing or damaged.
        """
        super().process_weights_after_loading(layer)
        refuse_to_reload(layer.qweight)

    def restore_weights_before_loading(self, layer: nn.Module) -> None:
        """Refuse other weights for a running engine."""
        refuse()
