"""Calls captured in CUDA graphs, as engines do it."""

from __future__ import annotations

from collections.abc import Callable

import torch

SIZES = (64, 8, 1)
"""Numbers of tokens to capture a graph for."""


class Graphs:
    """A graph for each number of tokens, the largest first, all in one memory pool.

    Args:
        call: What is captured.
        inputs: Makes its arguments for a number of tokens.
    """

    def __init__(self, call: Callable[..., torch.Tensor], inputs: Callable[[int], tuple[torch.Tensor, ...]]):
        self.captured = {}
        pool = torch.cuda.graph_pool_handle()
        for size in SIZES:
            static, graph = inputs(size), torch.cuda.CUDAGraph()
            call(*static)  # engines, too, run a size once before they capture it
            with torch.cuda.graph(graph, pool=pool):
                out = call(*static)
            self.captured[size] = (graph, static, out)

    def __call__(self, *arguments: torch.Tensor) -> torch.Tensor:
        """Replay the graph of this size with other arguments."""
        graph, static, out = self.captured[len(arguments[0])]
        for place, argument in zip(static, arguments, strict=True):
            place.copy_(argument)
        out.fill_(float("nan"))
        graph.replay()
        return out.clone()
