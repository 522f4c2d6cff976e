"""Arrival counters for the splits of K: zeroed memory that outlives a call, safe under CUDA graph capture.

The kernels leave a counter at zero, so that it must be zeroed once only. Two launches that may overlap must not share
one: eager calls on a stream never overlap, and a graph never overlaps itself, so each stream has its counters
and each captured call its own.
"""

from __future__ import annotations

import torch

_POOL = 1 << 20

_by_stream: dict[tuple[torch.device, int], torch.Tensor] = {}
_for_graphs: dict[torch.device, torch.Tensor] = {}


def counters(device: torch.device, count: int) -> torch.Tensor:
    """``count`` or more int32 zeros on ``device``, for one launch on the current stream.

    Inside a capture they come from a pool of 4 MB that earlier eager calls left behind. Without one, or once it is
    used up, they are allocated and zeroed in the graph itself, which costs each replay a small launch.
    """
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        pool = _for_graphs.get(device)
        if pool is None or pool.numel() < count:
            return torch.zeros(count, dtype=torch.int32, device=device)
        _for_graphs[device] = pool[count:]
        return pool[:count]
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    mine = _by_stream.get(key)
    if mine is None or mine.numel() < count:
        mine = _by_stream[key] = torch.zeros(max(count, 4096), dtype=torch.int32, device=device)
        if device not in _for_graphs:
            _for_graphs[device] = torch.zeros(_POOL, dtype=torch.int32, device=device)
            torch.cuda.synchronize(device)  # once: a graph may be replayed on any stream, before this one is done
    return mine
