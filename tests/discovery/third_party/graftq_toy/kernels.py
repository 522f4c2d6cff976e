"""A kernel provider that prefers one kind of layer, and leaves the arithmetic to the reference."""

from __future__ import annotations

from collections.abc import Iterable

from graftq.plugin.hookspecs import hookimpl
from graftq.quant_linear.reference import TorchProvider
from graftq.quant_linear.selection import Accepted, KernelProvider, Rejected, Request, Verdict


class ToyProvider(TorchProvider):
    name = "toy"
    priority = 1000

    def judge(self, request: Request) -> Verdict:
        return Accepted() if request.spec.bits == 4 else Rejected("the toy kernel knows 4 bits only")


@hookimpl
def graftq_kernels() -> Iterable[KernelProvider]:
    return [ToyProvider()]
