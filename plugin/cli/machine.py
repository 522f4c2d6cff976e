"""Which kernel a layer would get on this machine, and why it would not get another."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from graftq.quant_linear.experts_spec import ExpertsSpec
    from graftq.quant_linear.selection import ExpertsRequest, Request
    from graftq.quant_linear.spec import QuantSpec


def device() -> str:
    """Type of the device that a model would be put on: the accelerator if there is one."""
    import torch

    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found.type if found is not None else "cpu"


def verdicts(spec: QuantSpec | ExpertsSpec, dtype: str) -> dict[str, str]:
    """Every provider's name to "accepted" or its reason to refuse, in the order of preference."""
    from graftq.plugin.manager import experts_providers, kernel_providers
    from graftq.quant_linear.selection import ExpertsRequest, Rejected, select

    request = _request(spec, dtype)
    if isinstance(request, ExpertsRequest):
        said = select(request, experts_providers()).verdicts
    else:
        said = select(request, kernel_providers()).verdicts
    return {
        name: f"refused: {verdict.reason}" if isinstance(verdict, Rejected) else "accepted"
        for name, verdict in said.items()
    }


def kernel(spec: QuantSpec | ExpertsSpec, dtype: str) -> str:
    """Name of the kernel for a layer or a layer's experts, or why there is none."""
    from graftq.plugin.manager import find_experts_kernel, find_kernel
    from graftq.quant_linear.selection import ExpertsRequest, NoKernelError

    request = _request(spec, dtype)
    try:
        found = find_experts_kernel(request) if isinstance(request, ExpertsRequest) else find_kernel(request)
    except NoKernelError as error:
        return f"none: {error}"
    return found.provider.name


def _request(spec: QuantSpec | ExpertsSpec, dtype: str) -> Request | ExpertsRequest:
    import torch

    from graftq.quant_linear.selection import ExpertsRequest, Request
    from graftq.quant_linear.spec import QuantSpec

    if isinstance(spec, QuantSpec):
        return Request(spec, device(), getattr(torch, dtype))
    return ExpertsRequest(spec, device(), getattr(torch, dtype))
