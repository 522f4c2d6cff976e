"""Arrival counters for the splits of K: zeroed memory that outlives a call, safe under CUDA graph capture.

The kernels leave a counter at zero, so that it must be zeroed once only. Two launches that may overlap must not share
one: eager calls on a stream never overlap, and a graph never overlaps itself, so each stream has its counters
and each captured call its own. All come out of one block that exists before any graph is captured: ``torch.compile``
refuses graphs during whose warm-up something was allocated that stays.
"""

from __future__ import annotations

import torch

_BLOCK = 2 << 20  # 8 MB: a thousand layers of 4096 outputs in thirty graphs
_PER_STREAM = 4096

_by_stream: dict[tuple[torch.device, int], torch.Tensor] = {}
_free: dict[torch.device, torch.Tensor] = {}


def reserve(device: torch.device) -> None:
    """Allocate the block of ``device``, once; to be called while a model is loaded."""
    if device.type == "cuda" and device not in _free:
        _free[device] = torch.zeros(_BLOCK, dtype=torch.int32, device=device)
        torch.cuda.synchronize(device)  # a graph may be replayed on any stream, before this one is done


def counters(device: torch.device, count: int) -> torch.Tensor:
    """``count`` or more int32 zeros on ``device``, for one launch on the current stream.

    What a captured launch gets is not given back. Once the block is used up, or was never reserved, counters are
    allocated, in a capture together with a launch more per replay that zeroes them.
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


def forget_graphs() -> None:
    """Start anew; for a program that has destroyed every graph it captured, like a benchmark."""
    devices = list(_free)
    _free.clear()
    _by_stream.clear()
    for device in devices:
        reserve(device)


def _take(device: torch.device, count: int) -> torch.Tensor:
    free = _free.get(device)
    if free is None or free.numel() < count:
        return torch.zeros(count, dtype=torch.int32, device=device)
    _free[device] = free[-(-count // 32) * 32 :]  # kernels are compiled for aligned addresses
    return free[:count]
