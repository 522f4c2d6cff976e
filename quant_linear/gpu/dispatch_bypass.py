"""Calls of an operator's implementation without torch's dispatcher, and the current device during such calls.

The dispatcher costs a call of ten arguments some 5 to 10 us of host time. Where nothing observes operators, the
implementation is called directly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch._C import _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack

Operator = TypeVar("Operator", bound=Callable[..., torch.Tensor])


def on_its_device(implementation: Operator) -> Operator:
    """Make the device of the first argument, a tensor, the current one during the call: Triton launches there.

    All arguments are positional, as the dispatcher passes them.
    """

    @functools.wraps(implementation)
    def run(x: torch.Tensor, *args: Any) -> torch.Tensor:
        if x.is_cuda and x.device.index != torch.cuda.current_device():
            with torch.cuda.device(x.device):
                return implementation(x, *args)
        return implementation(x, *args)

    return cast(Operator, run)


def is_unwatched(x: torch.Tensor) -> bool:
    """Whether calling an operator on ``x`` does no more than calling its implementation.

    False while something compiles, traces or transforms, while a dispatch mode (a counter of FLOPs, fake tensors) or a
    profiler observes operators, and for ``x`` of a subclass of ``torch.Tensor``.
    """
    return (
        not torch.compiler.is_compiling()
        and (type(x) is torch.Tensor or type(x) is torch.nn.Parameter)
        and _len_torch_dispatch_stack() == 0
        and peek_interpreter_stack() is None
        and not torch._C._get_tracing_state()
        and not torch.autograd._profiler_enabled()
    )
