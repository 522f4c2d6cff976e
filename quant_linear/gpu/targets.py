"""What is known of GPUs without asking one: limits, matrix instructions, refusals, and where the kernels have run.

Pure functions of a description, so that tests and compilers can ask about devices that are not there.
"""

from __future__ import annotations

from dataclasses import dataclass

_KILOBYTES = {
    "sm_70": 96,
    "sm_75": 64,
    "sm_80": 163,
    "sm_86": 99,
    "sm_87": 163,
    "sm_89": 99,
    "sm_90": 227,
    "sm_100": 227,
    "sm_103": 227,
    "sm_120": 99,
    "sm_121": 99,
}
"""Shared memory that one program may have (CUDA's programming guide); AMD's GPUs have 64 KB."""

HAS_RUN = frozenset({"sm_90"})
"""Architectures on which the kernels have been run."""

COMPILES = frozenset(
    {"sm_70", "sm_75", "sm_80", "sm_86", "sm_89", "sm_100", "sm_120", "gfx90a", "gfx942", "gfx1100", "gfx1201"}
)
"""Architectures for which the kernels have been compiled, and no more (``docs/devices.md``)."""


@dataclass(frozen=True)
class Device:
    """What a tile choice depends on.

    Attributes:
        backend: Triton's name, "cuda", "hip" or "xpu"; "cpu" in the interpreter.
        capability: Major times ten plus minor, CUDA only; else 0.
        processors: Multiprocessors, or what the backend calls them.
        arch: AMD's name of the architecture, such as "gfx942"; else empty.
        shared: Bytes of shared memory that one program may have; 0 if the device did not say.
    """

    backend: str
    capability: int
    processors: int
    arch: str = ""
    shared: int = 0

    @property
    def name(self) -> str:
        """The architecture as compilers call it: "sm_90", "gfx942"; else the backend."""
        return f"sm_{self.capability}" if self.capability else self.arch or self.backend

    @property
    def shared_memory(self) -> int:
        """Bytes of shared memory that one program may have; what any GPU has if nothing is known."""
        return self.shared or 1024 * _KILOBYTES.get(self.name, 64 if self.backend == "hip" else 48)

    @property
    def matrix_units(self) -> str:
        """The matrix instructions that Triton uses: "mma", "mfma", "wmma" or "" (none, or not known).

        Triton 3.6 compiles products for sm_70 and sm_75 without any.
        """
        if self.capability >= 80 or self.backend == "cpu":  # the interpreter runs the tiles of NVIDIA's GPUs
            return "mma"
        if self.arch in ("gfx908", "gfx90a", "gfx942", "gfx950"):
            return "mfma"
        return "wmma" if self.arch.startswith(("gfx11", "gfx12")) else ""

    @property
    def standing(self) -> str:
        """Whether the kernels have been run on this architecture, only compiled for it, or neither."""
        if self.name in HAS_RUN:
            return "the kernels have been run on this architecture"
        if self.name in COMPILES:
            return "the kernels have been compiled for this architecture, and never run on it"
        return "the kernels have been neither run on nor compiled for this architecture"


def refusal(device: Device, is_bfloat16: bool) -> tuple[str, str] | None:
    """Why the kernels cannot run on ``device``, and what a user could do; None if they can."""
    if device.backend == "cuda" and device.capability < 70:
        return f"compute capability {device.capability / 10}: Triton compiles for 7.0 and newer", ""
    if device.backend == "cuda" and device.capability < 80 and is_bfloat16:
        said = f"compute capability {device.capability / 10} has no bfloat16 instructions"
        return said, "load the model with dtype=torch.float16"
    return None
