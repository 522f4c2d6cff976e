"""The activations between an expert's up and down projections that kernels know by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

Activate = Callable[[torch.Tensor], torch.Tensor]
"""From [tokens, 2 * intermediate] (ungated: [tokens, intermediate]) to [tokens, intermediate]."""

_FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square(),
}


@dataclass(frozen=True)
class Activation:
    """A formula with a name.

    Attributes:
        name: "silu", "gelu" (with erf), "gelu_tanh", "relu", "relu2": ``f(gate) * up``, or ``f(up)`` without a
            gate. Or "swiglu_oai", GPT-OSS's: ``(up + 1) * gate * sigmoid(alpha * gate)`` of
            ``gate = min(gate, limit)`` and ``up = clamp(up, -limit, limit)``.
        alpha: For "swiglu_oai".
        limit: For "swiglu_oai".
    """

    name: str
    alpha: float = 0.0
    limit: float = 0.0

    def of_product(self, x: torch.Tensor, is_gated: bool, is_concatenated: bool) -> torch.Tensor:
        """Of ``up``'s output: [tokens, 2 * intermediate] (ungated: [tokens, intermediate]) to [tokens, intermediate].

        Args:
            x: The output.
            is_gated: Whether it holds gate values.
            is_concatenated: Whether these are its first half rather than every other value.
        """
        if not is_gated:
            return self(None, x)
        gate, up = x.chunk(2, -1) if is_concatenated else (x[..., ::2], x[..., 1::2])
        return self(gate, up)

    def __call__(self, gate: torch.Tensor | None, up: torch.Tensor) -> torch.Tensor:
        """The reference: gate and up [tokens, intermediate], ``gate`` None where there is none; the same shape."""
        if self.name == "swiglu_oai":
            assert gate is not None
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
            return (up + 1) * (gate * torch.sigmoid(gate * self.alpha))
        function = _FUNCTIONS[self.name]
        return function(up) if gate is None else function(gate) * up


def recognize(activate: Activate, is_gated: bool, is_concatenated: bool) -> Activation | None:
    """Name what ``activate`` computes, by its values rather than by its class; None if it is none of ours.

    Probed on the CPU in float32, densely where functions bend and far out where limits lie. An ``activate`` that
    holds weights elsewhere, or draws random numbers, is none of ours.
    """
    far = torch.tensor([20.0, 50.0, 200.0, 1e3, 1e4], device="cpu")
    steps = torch.cat((torch.linspace(-12, 12, 97, device="cpu"), far, -far))
    gate: torch.Tensor | None
    gate, up = (grid.flatten() for grid in torch.meshgrid(steps, steps, indexing="ij"))
    if not is_gated:
        gate, up, x = None, steps, steps
    elif is_concatenated:
        x = torch.cat((gate, up))
    else:
        x = torch.stack((gate, up), dim=-1).flatten()
    candidates = [Activation(name) for name in _FUNCTIONS]
    if is_gated:
        candidates.append(Activation("swiglu_oai", alpha=1.702, limit=7.0))
    try:
        with torch.no_grad():
            found = activate(x[None])[0]
    except Exception:  # it wants another width, device or dtype: not a plain formula
        return None
    for candidate in candidates:
        expected = candidate(gate, up)
        if found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-5, atol=1e-5):
            return candidate
    return None
