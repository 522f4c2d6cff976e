"""Arrangements of a projection's tensors in memory, as frozen values with exact inverses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from graftq.quant_linear.spec import QuantSpec


@dataclass(frozen=True)
class GptqTensors:
    """One projection exactly as the checkpoint stores it; shapes in :class:`QuantSpec`."""

    qweight: torch.Tensor
    qzeros: torch.Tensor
    scales: torch.Tensor
    g_idx: torch.Tensor | None = None
    bias: torch.Tensor | None = None


class Layout(Protocol):
    """How a kernel wants the weights. ``unpack(pack(t))`` equals ``t`` bit for bit, for every ``t``."""

    @property
    def spec(self) -> QuantSpec:
        """The projection."""

    def pack(self, tensors: GptqTensors) -> dict[str, torch.Tensor]:
        """Rearrange checkpoint tensors, once, at load. The names become the layer's parameters."""

    def unpack(self, packed: Mapping[str, torch.Tensor]) -> GptqTensors:
        """Restore the checkpoint tensors, dtypes and ``g_idx`` included."""


@dataclass(frozen=True)
class CheckpointLayout:
    """The checkpoint's own arrangement: nothing moves."""

    spec: QuantSpec

    def pack(self, tensors: GptqTensors) -> dict[str, torch.Tensor]:
        """Return the tensors that exist, under their checkpoint names."""
        return {name: tensor for name, tensor in vars(tensors).items() if tensor is not None}

    def unpack(self, packed: Mapping[str, torch.Tensor]) -> GptqTensors:
        """Return the same tensors."""
        return GptqTensors(**packed)
