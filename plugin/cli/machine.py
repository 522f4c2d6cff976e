"""Which kernel a layer would get on this machine, and why it would not get another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graftq.quant_linear.experts_spec import ExpertsSpec
    from graftq.quant_linear.selection import Request
    from graftq.quant_linear.spec import QuantSpec


def device() -> str:
    """Type of the device that a model would be put on: the accelerator if there is one."""
    import torch

    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found.type if found is not None else "cpu"


def gpus() -> list[str]:
    """What graftq knows of each GPU that is here: its name, limits, and whether the kernels have been run on such."""
    import torch

    from graftq.quant_linear.gpu.devices import present

    return [
        f"{torch.cuda.get_device_properties(index).name} ({found.name}): {found.shared_memory // 1024} KB of shared "
        f"memory, matrix instructions: {found.matrix_units or 'none'}; {found.standing}"
        for index, found in enumerate(present("cuda"))
    ]


def verdicts(spec: QuantSpec | ExpertsSpec, dtype: str) -> dict[str, str]:
    """Every provider's name to "accepted" or its reason to refuse, in the order of preference."""
    from graftq.plugin.manager import kernel_providers
    from graftq.quant_linear.selection import Rejected, select

    return {
        name: f"refused: {verdict.reason}" if isinstance(verdict, Rejected) else "accepted"
        for name, verdict in select(_request(spec, dtype), kernel_providers()).verdicts.items()
    }


def kernel(spec: QuantSpec | ExpertsSpec, dtype: str) -> str:
    """Name of the kernel for a layer or a layer's experts, or why there is none."""
    from graftq.plugin.manager import find_kernel
    from graftq.quant_linear.selection import NoKernelError

    try:
        return find_kernel(_request(spec, dtype)).provider.name
    except NoKernelError as error:
        return f"none: {error}"


def _request(spec: QuantSpec | ExpertsSpec, dtype: str) -> Request[Any]:
    import torch

    from graftq.quant_linear.selection import Request

    return Request(spec, device(), getattr(torch, dtype))
