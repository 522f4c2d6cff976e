"""What the experts of one layer are: a frozen value that fused kernels are chosen by."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

from graftq.quant_linear.activations import Activation
from graftq.quant_linear.spec import QuantSpec

PROJECTIONS = ("gate_proj", "gate_up_proj", "up_proj", "down_proj")
"""The names that an expert's projections may have, in order."""


@dataclass(frozen=True)
class ExpertsSpec:
    """All projections of the experts of one mixture-of-experts layer.

    Attributes:
        projections: Name and one spec per expert, in order. The names are ``gate_proj, up_proj, down_proj``,
            ``gate_up_proj, down_proj`` (gate and up in one) or ``up_proj, down_proj`` (no gate).
        activation: The function between up and down; None for one that has no name here.
        is_concatenated: Whether the activation's input is ``[gate; up]`` rather than gate and up interleaved.
        has_up_bias: Whether the layer adds a bias of its own, [num_experts, width], to gate and up.
        has_down_bias: Likewise, [num_experts, hidden], to down.
        has_norm: Whether each expert's output goes through a norm before it is weighted.
        signature: What :class:`ExpertsForm` has, in one string, for operators, as in ``QuantSpec``.
    """

    projections: tuple[tuple[str, tuple[QuantSpec, ...]], ...]
    activation: Activation | None
    is_concatenated: bool = True
    has_up_bias: bool = False
    has_down_bias: bool = False
    has_norm: bool = False
    signature: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Write the signature."""
        activation = self.activation or Activation("")
        parts = (
            activation.name,
            activation.alpha,
            activation.limit,
            int(self.is_gated),
            self.projections[0][1][0].signature,
            self.projections[-1][1][0].signature,
        )
        object.__setattr__(self, "signature", "|".join(map(str, parts)))

    @property
    def num_experts(self) -> int:
        """Experts of the layer."""
        return len(self.projections[0][1])

    @property
    def is_gated(self) -> bool:
        """Whether there are gate values."""
        return self.names != ("up_proj", "down_proj")

    @property
    def names(self) -> tuple[str, ...]:
        """The projections' names."""
        return tuple(name for name, _ in self.projections)

    def of(self, name: str) -> tuple[QuantSpec, ...]:
        """The specs of one projection, one per expert."""
        return dict(self.projections)[name]


@dataclass(frozen=True)
class ExpertsForm:
    """Experts of one kind, as far as fused kernels care.

    Attributes:
        activation, is_gated: As in :class:`ExpertsSpec`.
        up: The first expert's first projection, which stands for gate and up of all.
        down: Its ``down_proj``.
    """

    activation: Activation | None
    is_gated: bool
    up: QuantSpec
    down: QuantSpec

    @staticmethod
    @lru_cache(maxsize=1024)
    def parse(signature: str) -> ExpertsForm:
        """The form that has this signature."""
        name, alpha, limit, is_gated, up, down = signature.split("|")
        activation = Activation(name, float(alpha), float(limit)) if name else None
        return ExpertsForm(activation, bool(int(is_gated)), QuantSpec.parse(up), QuantSpec.parse(down))
