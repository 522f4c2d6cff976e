"""Arrival counters for the splits of K: zeroed memory that outlives a call, safe under CUDA graph capture.

The kernels leave a counter at zero, so that it must be zeroed once only. Two launches that may overlap must not share
one: eager calls on a stream never overlap, and a graph never overlaps itself, so each stream has its counters
and each captured call its own.
"""

from __future__ import annotations

import torch
from triton.runtime import driver

_POOL = 2 << 20  # 8 MB: a thousand layers of 4096 outputs in thirty graphs

_by_stream: dict[tuple[torch.device, int], torch.Tensor] = {}
_for_graphs: dict[torch.device, torch.Tensor] = {}


def counters(device: torch.device, count: int) -> torch.Tensor:
    """``count`` or more int32 zeros on ``device``, for one launch on the current stream.

    Inside a capture they come from a pool that the first eager call left behind, and are not given back. Without a
    pool, or once it is used up, they are allocated and zeroed in the graph itself: a launch more per replay.
    """
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        pool = _for_graphs.get(device)
        if pool is None or pool.numel() < count:
            return torch.zeros(count, dtype=torch.int32, device=device)
        _for_graphs[device] = pool[count:]
        return pool[:count]
    key = (device, driver.active.get_current_stream(device.index))
    mine = _by_stream.get(key)
    if mine is None or mine.numel() < count:
        mine = _by_stream[key] = torch.zeros(max(count, 4096), dtype=torch.int32, device=device)
        if device not in _for_graphs:
            _for_graphs[device] = torch.zeros(_POOL, dtype=torch.int32, device=device)
            torch.cuda.synchronize(device)  # once: a graph may be replayed on any stream, before this one is done
    return mine


def forget_graphs() -> None:
    """Start the pool for graphs anew; for a program that has destroyed every graph it captured, like a benchmark."""
    for device in _for_graphs:
        _for_graphs[device] = torch.zeros(_POOL, dtype=torch.int32, device=device)
        torch.cuda.synchronize(device)
