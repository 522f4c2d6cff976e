"""What launches call the tensors that all products read: a layer's, or with a prefix a stack's.

Kernels take all their tensors at every call. For one that is absent, which they do not touch, they get any other.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from graftq.quant_linear.gpu.split_counters import counters
from graftq.quant_linear.kernels.launch import Part


def weight_names(prefix: str, bits: int, is_symmetric: bool) -> tuple[str, ...]:
    """Codes, high, scales and zeros."""
    names = ("codes", "high" if bits == 3 else "codes", "scales", "codes" if is_symmetric else "zeros")
    return tuple(prefix + name for name in names)


def bias_name(prefix: str, has_bias: bool) -> str:
    """The bias."""
    return prefix + ("bias" if has_bias else "scales")


class SplitSpace(NamedTuple):
    """The partial sums and arrival counters that a launch needs for its splits of K.

    Attributes:
        partials: float32 partial sums; 0 if there is one split.
        arrivals: Counters.
        names: What launches call both.
    """

    partials: int
    arrivals: int
    names: tuple[str, str]

    @staticmethod
    def of(prefix: str, partials: int, arrivals: int) -> SplitSpace:
        """For the product with the tensors of that prefix."""
        names = ("partials", "arrivals") if partials else ("scales", "codes")
        return SplitSpace(partials, arrivals, (prefix + names[0], prefix + names[1]))

    @property
    def parts(self) -> dict[str, Part]:
        """Of the workspace."""
        return {self.names[0]: Part(self.partials, torch.float32)} if self.partials else {}

    def counters(self, device: torch.device) -> Tensor | None:
        """For a launch on the current stream."""
        return counters(device, self.arrivals) if self.partials else None
