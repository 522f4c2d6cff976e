"""What surrounds the implementation of an operator: the current device, and torch's dispatcher.

The dispatcher costs a call of ten arguments some 5 to 10 us of host time, so it is passed where nobody would notice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec

import torch
from torch._C import _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack

P = ParamSpec("P")
Operator = Callable[Concatenate[torch.Tensor, P], torch.Tensor]


def on_its_device(implementation: Operator[P]) -> Operator[P]:
    """Make the first tensor's device the current one meanwhile: Triton launches there."""

    @functools.wraps(implementation)
    def run(x: torch.Tensor, *args: P.args, **kwargs: P.kwargs) -> torch.Tensor:
        if x.is_cuda and x.device.index != torch.cuda.current_device():
            with torch.cuda.device(x.device):
                return implementation(x, *args, **kwargs)
        return implementation(x, *args, **kwargs)

    return run


def is_unwatched(x: torch.Tensor) -> bool:
    """Whether calling an operator on ``x`` comes to calling its implementation.

    Not while something compiles, traces or transforms, a dispatch mode looks at operators (counters of FLOPs, fake
    tensors), a profiler wants their names, or ``x`` is of a class of its own.
    """
    return (
        not torch.compiler.is_compiling()
        and (type(x) is torch.Tensor or type(x) is torch.nn.Parameter)
        and _len_torch_dispatch_stack() == 0
        and peek_interpreter_stack() is None
        and not torch._C._get_tracing_state()
        and not torch.autograd._profiler_enabled()
    )
