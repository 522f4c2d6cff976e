"""Arrival counters for the splits of K: zeroed memory that outlives a call, safe under CUDA graph capture.

The kernels leave a counter at zero, so that it is zeroed only once. Launches that may overlap must not share counters.
Eager calls on one stream never overlap, nor does a graph with itself: so each stream has its own counters, and each
captured call has its own. All are taken from one block that is allocated before any graph is captured:
``torch.compile`` refuses graphs whose warm-up allocates memory that stays.
"""

from __future__ import annotations

import torch

_BLOCK = 2 << 20  # 8 MB: a thousand layers of 4096 outputs in thirty graphs
_PER_STREAM = 4096

_by_stream: dict[tuple[torch.device, int], torch.Tensor] = {}
"""The counters of eager calls, by device and stream."""

_free: dict[torch.device, torch.Tensor] = {}
"""What is left of each device's block."""


def reserve(device: torch.device) -> None:
    """Allocate the block of ``device``, unless it is there; to be called while a model is loaded."""
    if device.type == "cuda" and device not in _free:
        _free[device] = torch.zeros(_BLOCK, dtype=torch.int32, device=device)
        torch.cuda.synchronize(device)  # a graph may be replayed on any stream, before this one is done


def counters(device: torch.device, count: int) -> torch.Tensor:
    """``count`` or more int32 zeros on ``device``, for one launch on the current stream.

    A captured launch keeps its counters for good. If the block is used up or was never reserved, they are allocated
    anew; within a capture this adds a launch to every replay, which zeroes them.
    """
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        return _take(device, count)
    key = (device, torch._C._cuda_getCurrentRawStream(device.index))
    mine = _by_stream.get(key)
    if mine is None or mine.numel() < count:
        reserve(device)
        mine = _by_stream[key] = _take(device, max(count, _PER_STREAM))
    return mine


def _take(device: torch.device, count: int) -> torch.Tensor:
    free = _free.get(device)
    if free is None or free.numel() < count:
        return torch.zeros(count, dtype=torch.int32, device=device)
    _free[device] = free[-(-count // 32) * 32 :]  # kernels are compiled for aligned addresses
    return free[:count]
