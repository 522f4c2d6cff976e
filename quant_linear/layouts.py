"""Arrangements of a projection's tensors in memory, as frozen values with exact inverses."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from graftq.quant_linear.experts_spec import ExpertsSpec
from graftq.quant_linear.spec import QuantSpec


@dataclass(frozen=True)
class GptqTensors:
    """One projection exactly as the checkpoint stores it; shapes in :class:`QuantSpec`."""

    qweight: torch.Tensor
    qzeros: torch.Tensor
    scales: torch.Tensor
    g_idx: torch.Tensor | None = None
    bias: torch.Tensor | None = None


def owned(part: torch.Tensor) -> torch.Tensor:
    """A part of a tensor, contiguous, in memory of its own: a view would keep all of the tensor in memory."""
    is_whole = part.untyped_storage().nbytes() == part.nbytes
    return part.contiguous() if is_whole else part.clone(memory_format=torch.contiguous_format)


STORED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64)
"""What the numbers of :func:`stored_dtypes` stand for."""

KEPT = ("scales", "bias", "g_idx")
"""Tensors that are restored in the dtype in which they are stored, whatever a layout keeps them in."""


def stored_dtypes(stored: Iterable[GptqTensors]) -> torch.Tensor:
    """The dtypes of each projection's :data:`KEPT`, as numbers: int8 [projections, 3] on the CPU, -1 for none."""
    tensors = [[getattr(each, name) for name in KEPT] for each in stored]
    codes = [[-1 if tensor is None else STORED_DTYPES.index(tensor.dtype) for tensor in each] for each in tensors]
    return torch.tensor(codes, dtype=torch.int8, device="cpu")


class Packed(dict[str, torch.Tensor]):
    """Tensors by name, as a layout has arranged them.

    Attributes:
        form: Which of its arrangements the layout has chosen, as a value of its own; None where it has only one.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], form: Hashable = None):
        super().__init__(tensors)
        self.form = form


class Layout(Protocol):
    """How a kernel wants the weights. ``unpack(pack(t))`` equals ``t`` bit for bit, for every ``t``."""

    @property
    def spec(self) -> QuantSpec:
        """The projection."""

    def pack(self, tensors: GptqTensors) -> Packed:
        """Rearrange checkpoint tensors, once, at load. The names become the layer's parameters."""

    def unpack(self, packed: Packed) -> GptqTensors:
        """Restore the checkpoint tensors, dtypes and ``g_idx`` included."""


@dataclass(frozen=True)
class CheckpointLayout:
    """The checkpoint's own arrangement: nothing moves."""

    spec: QuantSpec

    def pack(self, tensors: GptqTensors) -> Packed:
        """Return the tensors that exist, under their checkpoint names."""
        return Packed({name: tensor for name, tensor in vars(tensors).items() if tensor is not None})

    def unpack(self, packed: Packed) -> GptqTensors:
        """Return the same tensors."""
        return GptqTensors(**packed)


class ExpertsLayout(Protocol):
    """How a kernel wants the experts of a layer. Bit for bit invertible, like :class:`Layout`."""

    @property
    def spec(self) -> ExpertsSpec:
        """The experts."""

    def pack(self, take: Callable[[str, int], GptqTensors]) -> Packed:
        """Rearrange checkpoint tensors, once, at load. The names become parameters of the experts module.

        Args:
            take: From a projection's name and an expert's number to its tensors. To be called once for each. It holds
                no reference to what it returns, so that dropping a tensor frees its memory.
        """

    def unpack(self, packed: Packed, name: str, expert: int) -> GptqTensors:
        """Restore the checkpoint tensors of one projection of one expert."""


@dataclass(frozen=True)
class SeparateLayout:
    """Every projection of every expert is a layer of its own, and has its own layout: nothing to do here."""

    spec: ExpertsSpec

    def pack(self, take: Callable[[str, int], GptqTensors]) -> Packed:
        """Nothing: the tensors stay in the layers."""
        return Packed({})

    def unpack(self, packed: Packed, name: str, expert: int) -> GptqTensors:
        """Not to be asked: the layers have the tensors."""
        raise LookupError(f"{expert}.{name} is a layer of its own")
