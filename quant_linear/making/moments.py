"""What calibration leaves of a layer's inputs: second moments, and how far they drifted from the float model's."""

from __future__ import annotations

import torch


class Moments:
    """Sums over tokens of ``x x^T``, for one layer or for a batch of experts of one shape.

    Attributes:
        gram: float32 [batch, K, K], the sum of ``x^T x``.
        drift: float32 [batch, K, K], the sum of ``(x_float - x)^T x``; None if only one stream is known.
        tokens: int64 [batch] on the CPU, how many rows were added.
    """

    def __init__(self, batch: int, width: int, device: torch.device | str = "cpu", with_drift: bool = False):
        self.gram = torch.zeros(batch, width, width, device=device)
        self.drift = torch.zeros(batch, width, width, device=device) if with_drift else None
        self.tokens = torch.zeros(batch, dtype=torch.int64)

    def add(self, x: torch.Tensor, x_float: torch.Tensor | None = None, index: int = 0) -> None:
        """Add rows.

        Args:
            x: The layer's inputs in the model quantized so far, any float dtype [tokens, K]; padding left out.
            x_float: The same tokens' inputs in the float model [tokens, K]; required where drift is kept.
            index: Which layer of the batch.

        Raises:
            ValueError: if an input is NaN or infinite.
        """
        x = x.to(torch.float32)
        gram = x.T @ x
        if not bool(torch.isfinite(gram.diagonal()).all()):
            raise ValueError("the calibration inputs hold NaN or infinite values, or overflow when squared")
        if self.drift is not None:
            if x_float is None:
                raise ValueError("drift is kept, and needs the float model's inputs")
            difference = x_float.to(torch.float32) - x
            self.drift[index] += difference.T @ x
        self.gram[index] += gram
        self.tokens[index] += len(x)

    def shrunk(self, pseudo_tokens: float) -> Moments:
        """Means instead of sums, each mixed with the average of all as if that had ``pseudo_tokens`` tokens.

        Experts that saw few tokens then lean on what all saw, and those that saw none take it whole.
        """
        mixed = Moments(0, 0)
        total = max(int(self.tokens.sum()), 1)
        count = self.tokens.to(self.gram.device, torch.float32)[:, None, None]

        def mix(sums: torch.Tensor) -> torch.Tensor:
            return (sums + sums.sum(0) * (pseudo_tokens / total)) / (count + pseudo_tokens)

        mixed.gram = mix(self.gram)
        mixed.drift = None if self.drift is None else mix(self.drift)
        mixed.tokens = self.tokens
        return mixed
