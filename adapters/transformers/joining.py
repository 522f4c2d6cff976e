"""Finds the layers of a model that share their input, by the names that transformers' models give them."""

from __future__ import annotations

from torch import nn

from graftq.quant_linear.experts import QuantExpert
from graftq.quant_linear.gpu.siblings import join_siblings
from graftq.quant_linear.linear import QuantLinear

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Children of one module that it calls one after the other with the same tensor."""


def join_model_siblings(model: nn.Module) -> None:
    """Multiply siblings in one where they allow it; see :func:`~graftq.quant_linear.gpu.siblings.join`."""
    for module in model.modules():
        if isinstance(module, QuantExpert):  # a kernel for all experts at once would have to take them apart again
            continue
        for names in SIBLINGS:
            layers = [getattr(module, name, None) for name in names]
            packed = [layer for layer in layers if isinstance(layer, QuantLinear)]
            if len(packed) == len(names):
                join_siblings(packed)
