"""Kernel selection is a pure function that answers with reasons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch

from graftq.quant_linear.layouts import CheckpointLayout, Layout
from graftq.quant_linear.reference import TorchProvider
from graftq.quant_linear.selection import Accepted, NoKernelError, Rejected, Request, Verdict, select
from graftq.quant_linear.spec import QuantSpec

SPEC = QuantSpec(4, 64, 32, 32, 2, True, True, 1, 64, 32, 64, 0)

ACCEPTED = Accepted()


@dataclass
class Fake:
    name: str
    priority: int
    verdict: Verdict = ACCEPTED
    experts: None = None

    def judge(self, request: Request) -> Verdict:
        return self.verdict

    def prepare(self) -> None: ...

    def layout(self, spec: QuantSpec) -> Layout:
        return CheckpointLayout(spec)

    def linear(self, x: torch.Tensor, packed: Mapping[str, torch.Tensor], spec: QuantSpec) -> torch.Tensor:
        raise NotImplementedError


REQUEST = Request(SPEC, "cpu", torch.float32)
FAST, SLOW, SHY = Fake("fast", 10), Fake("slow", 1), Fake("shy", 99, Rejected("only on Sundays"))


def test_highest_priority_among_the_accepting() -> None:
    selection = select(REQUEST, [SLOW, SHY, FAST])
    assert selection.provider is FAST
    assert selection.verdicts == {"shy": Rejected("only on Sundays"), "fast": Accepted(), "slow": Accepted()}


def test_order_of_registration_does_not_matter() -> None:
    twins = [Fake("b", 5), Fake("a", 5)]
    assert select(REQUEST, twins).provider.name == select(REQUEST, twins[::-1]).provider.name == "a"


def test_forced() -> None:
    assert select(REQUEST, [SLOW, FAST], forced="slow").provider is SLOW


def test_forced_but_rejecting() -> None:
    with pytest.raises(NoKernelError, match=r"GRAFTQ_KERNEL=shy .*only on Sundays"):
        select(REQUEST, [SHY, FAST], forced="shy")


def test_forced_but_unknown() -> None:
    with pytest.raises(NoKernelError, match="no such kernel; there are fast, slow"):
        select(REQUEST, [SLOW, FAST], forced="warp")


def test_nobody_accepts() -> None:
    with pytest.raises(NoKernelError, match="shy: only on Sundays"):
        select(REQUEST, [SHY])


def test_offloaded_weights_stay_as_they_are() -> None:
    repacking, keeping = Fake("fast", 10), Fake("slow", 1, Accepted(repacks=False))
    pinned = Request(SPEC, "cpu", torch.float32, pinned=True)
    assert select(REQUEST, [repacking, keeping]).provider is repacking
    assert select(pinned, [repacking, keeping]).provider is keeping


def test_the_reference_accepts_everything() -> None:
    assert isinstance(TorchProvider().judge(Request(SPEC, "xpu", torch.bfloat16)), Accepted)


def test_a_provider_that_fails_to_judge_is_out() -> None:
    class Broken(Fake):
        def judge(self, request: Request) -> Verdict:
            raise RuntimeError("no driver")

    selection = select(REQUEST, [Broken("broken", 99), SLOW])
    assert selection.provider is SLOW
    assert selection.verdicts["broken"] == Rejected("its own failure: RuntimeError: no driver")
