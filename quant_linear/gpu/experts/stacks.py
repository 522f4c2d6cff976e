"""The stacks that the experts' products read: their tensors, what launches depend on of them, and their names."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from graftq.quant_linear.gpu.devices import program_for
from graftq.quant_linear.gpu.tiled_layout import TiledLayout
from graftq.quant_linear.spec import QuantSpec


class Stack(NamedTuple):
    """The tensors of one product of all E experts, from ``TiledExpertsLayout``, in the operators' order of arguments.

    Attributes:
        codes: int32 [E, tiles, atoms, pairs of words].
        high: int32 [E, tiles, atoms, 256], 3 bits only.
        scales: [E, groups, 64 * tiles].
        zeros: int32 [E, groups, 32 * tiles], pairs of zero points; None if all experts are symmetric.
        order: int32 [E, parts, 128 * atoms]: the input row at each place; None if no rows have moved.
        columns: int32 [E, 64 * tiles]: the column of ``bias`` for each row; None if they are the same.
        bias: [E, columns], the checkpoint's or the model's own; None if there is none.
    """

    codes: Tensor
    high: Tensor | None
    scales: Tensor
    zeros: Tensor | None
    order: Tensor | None
    columns: Tensor | None
    bias: Tensor | None


class StackKind(NamedTuple):
    """All that a launch depends on of a stack but the tensors' addresses.

    Attributes:
        codes: Shape of ``codes``: experts, tiles of 64 output rows, atoms of 128 input rows, pairs of words of an atom.
        scale_rows: Rows of an expert's ``scales``.
        scale_dtype: Kernels are compiled for it.
        device: Of all tensors.
        is_symmetric: Whether there are no ``zeros``.
        order: Shape of ``order``; None if no rows have moved.
        bias: Width and dtype of ``bias``; None if there is none.
    """

    codes: torch.Size
    scale_rows: int
    scale_dtype: torch.dtype
    device: torch.device
    is_symmetric: bool
    order: torch.Size | None
    bias: tuple[int, torch.dtype] | None

    @staticmethod
    def of(stack: Stack) -> StackKind:
        """The kind of these tensors."""
        codes, _, scales, zeros, order, _, bias = stack
        fields = (
            codes.shape,
            scales.shape[1],
            scales.dtype,
            codes.device,
            zeros is None,
            None if order is None else order.shape,
            None if bias is None else (bias.shape[1], bias.dtype),
        )
        return tuple.__new__(StackKind, fields)

    @property
    def experts(self) -> int:
        """Experts of the layer."""
        return self.codes[0]

    @property
    def atoms(self) -> int:
        """Atoms of 128 input rows."""
        return self.codes[2]

    @property
    def bias_width(self) -> int:
        """Columns of the bias, 0 if there is none."""
        return 0 if self.bias is None else self.bias[0]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """``atoms``, ``groups`` and ``tiles_n`` of the kernels."""
        return self.atoms, self.scale_rows, self.codes[1]

    def constants(self, spec: QuantSpec, dtype: torch.dtype) -> tuple[object, ...]:
        """BITS, GROUP, SYM, PROGRAM and HAS_BIAS for activations of ``dtype``."""
        program = program_for(self.device, spec.bits, dtype, self.is_symmetric)
        return spec.bits, TiledLayout(spec).group(self.scale_rows), self.is_symmetric, program, self.bias is not None


def stack_names(prefix: str) -> tuple[str, ...]:
    """What launches call the tensors of a stack."""
    return tuple(prefix + name for name in Stack._fields)


def column_name(prefix: str, kind: StackKind) -> str:
    """The columns of the bias; for the first stack, which has them wherever there is a bias."""
    return prefix + ("codes" if kind.bias is None else "columns")
