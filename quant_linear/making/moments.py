"""What calibration leaves of a layer's inputs: second moments, and how far they drifted from the float model's."""

from __future__ import annotations

import torch

from graftq.quant_linear.making.products import has_half_products


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

    def add(self, x: torch.Tensor, x_float: torch.Tensor | None = None, *, index: int = 0) -> None:
        """Add rows.

        Args:
            x: The layer's inputs in the model quantized so far, any float dtype [tokens, K]; padding left out.
            x_float: The same tokens' inputs in the float model [tokens, K]; required where drift is kept.
            index: Which layer of the batch.

        Raises:
            ValueError: if drift is kept and ``x_float`` is not given.
        """
        if self.drift is not None and x_float is None:
            raise ValueError("drift is kept, and needs the float model's inputs")
        self.tokens[index] += len(x)
        if has_half_products(x.device, x.dtype):  # exact so, as the products of half-precision numbers are
            gram = torch.mm(x.T, x, out_dtype=torch.float32)
            if self.drift is not None and x_float is not None:
                self.drift[index].add_(torch.mm(x_float.to(x.dtype).T, x, out_dtype=torch.float32).sub_(gram))
            self.gram[index].add_(gram)
            return
        x = x.to(torch.float32)
        self.gram[index].add_(x.T @ x)
        if self.drift is not None and x_float is not None:
            self.drift[index].add_((x_float.to(torch.float32) - x).T @ x)

    def check(self) -> None:
        """Make sure that all inputs were numbers: once for all rows, as a GPU is waited for here.

        Raises:
            ValueError: if an input was NaN or infinite.
        """
        if not bool(torch.isfinite(self.gram.diagonal(dim1=1, dim2=2)).all()):
            raise ValueError("the calibration inputs hold NaN or infinite values, or overflow when squared")

    def shrunk(self, pseudo_tokens: float) -> Moments:
        """Means instead of sums, each mixed with the average of all as if that had ``pseudo_tokens`` tokens.

        Experts that saw few tokens then lean on what all saw, and those that saw none take it whole. The sums are
        overwritten: those of wide experts would not fit twice.
        """
        mixed = Moments(0, 0)
        total = max(int(self.tokens.sum()), 1)
        count = self.tokens.to(self.gram.device, torch.float32)[:, None, None]

        def mix(sums: torch.Tensor) -> torch.Tensor:
            return sums.add_(sums.sum(0) * (pseudo_tokens / total)).div_(count + pseudo_tokens)

        mixed.gram = mix(self.gram)
        mixed.drift = None if self.drift is None else mix(self.drift)
        mixed.tokens = self.tokens
        return mixed
