"""Past torch's dispatcher, where nobody would notice: it costs a call of ten arguments some 5 to 10 us of host time."""

from __future__ import annotations

import torch
from torch._C import _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack


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
