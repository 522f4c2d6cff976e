"""A second, independent GPTQ quantizer and packer: numpy and Python integers, no line shared with graftq.

Rounding to nearest is enough: the tests ask whether a checkpoint is read right, not how good it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Recipe:
    """How to quantize; the names are those of ``quantize_config.json``."""

    bits: int = 4
    group_size: int = 32
    desc_act: bool = True
    sym: bool = True
    checkpoint_format: str = "gptq"
    scales: torch.dtype = torch.float16
    zero_bias: bool = False

    def __str__(self) -> str:
        order = "act" if self.desc_act else "seq"
        symmetry = "sym" if self.sym else "asym"
        return f"{self.bits}bit-{self.group_size}g-{order}-{symmetry}-{self.checkpoint_format}"

    def config(self) -> dict[str, object]:
        """What AutoGPTQ would write into ``quantize_config.json``."""
        return {
            "bits": self.bits,
            "group_size": self.group_size,
            "desc_act": self.desc_act,
            "sym": self.sym,
            "checkpoint_format": self.checkpoint_format,
            "quant_method": "gptq",
            "true_sequential": True,
            "damp_percent": 0.1,
        }


def pack_stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes [count, columns] to int32 words [ceil(count * bits / 32), columns], one big integer a column."""
    count, columns = codes.shape
    words = -(-count * bits // 32)
    out = np.empty((words, columns), dtype=np.uint32)
    for column in range(columns):
        stream = 0
        for position, code in enumerate(codes[:, column].tolist()):
            stream |= int(code) << (position * bits)
        out[:, column] = np.frombuffer(stream.to_bytes(words * 4, "little"), dtype=np.uint32)
    return out.view(np.int32)


def quantize(
    weight: torch.Tensor, recipe: Recipe, rng: np.random.Generator
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Quantize ``weight`` [N, K].

    Returns:
        The tensors by suffix, and the float32 weight [N, K] that they stand for.
    """
    n, k = weight.shape
    group_size = k if recipe.group_size == -1 else recipe.group_size
    groups = -(-k // group_size)
    g_idx = np.arange(k) // group_size
    if recipe.desc_act and recipe.group_size != -1:
        g_idx = rng.permutation(g_idx)
    w = weight.detach().float().numpy().T  # [K, N]
    levels = 2**recipe.bits
    scales = np.empty((groups, n), dtype=np.float32)
    zeros = np.full((groups, n), levels // 2, dtype=np.int64)
    for group in range(groups):
        rows = w[g_idx == group]
        if recipe.sym:
            scales[group] = 2 * np.abs(rows).max(0) / (levels - 1)
        else:
            low, high = np.minimum(rows.min(0), 0), np.maximum(rows.max(0), 0)
            scales[group] = (high - low) / (levels - 1)
            zeros[group] = np.clip(np.round(-low / np.maximum(scales[group], 1e-8)), 1, levels - 1)
    stored_scales = torch.from_numpy(np.maximum(scales, 1e-4)).to(recipe.scales)
    exact = stored_scales.float().numpy()
    codes = np.clip(np.round(w / exact[g_idx]) + zeros[g_idx], 0, levels - 1).astype(np.int64)
    dequantized = (codes - zeros[g_idx]).astype(np.float32) * exact[g_idx]
    stored_zeros = zeros - (0 if recipe.checkpoint_format == "gptq_v2" else 1)
    tensors = {
        "qweight": torch.from_numpy(pack_stream(codes, recipe.bits)),
        "qzeros": torch.from_numpy(np.ascontiguousarray(pack_stream(stored_zeros.T, recipe.bits).T)),
        "scales": stored_scales,
        "g_idx": torch.from_numpy(g_idx.astype(np.int32)),
    }
    return tensors, torch.from_numpy(np.ascontiguousarray(dequantized.T))


def dequantize(
    qweight: np.ndarray, qzeros: np.ndarray, scales: np.ndarray, g_idx: np.ndarray, bits: int
) -> torch.Tensor:
    """The float32 weight [N, K] of a projection as format "gptq" stores it, for widths that divide 32."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    mask = np.uint32(2**bits - 1)
    codes = (qweight.view(np.uint32)[:, None, :] >> shifts[None, :, None] & mask).reshape(-1, qweight.shape[1])
    zeros = (qzeros.view(np.uint32)[:, :, None] >> shifts & mask).reshape(qzeros.shape[0], -1) + 1
    weight = (codes.astype(np.float32) - zeros[g_idx].astype(np.float32)) * scales.astype(np.float32)[g_idx]
    return torch.from_numpy(np.ascontiguousarray(weight.T))
