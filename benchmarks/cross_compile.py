"""What ``compile_matrix`` compiles: the devices are described, not present."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import triton
from compiled_code import read_amd, read_nvidia
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from graftq.quant_linear.activations import Activation
from graftq.quant_linear.experts_spec import ExpertsSpec
from graftq.quant_linear.gpu import dequantized_weights, devices
from graftq.quant_linear.gpu.experts import ops
from graftq.quant_linear.gpu.experts.stacks import StackKind
from graftq.quant_linear.gpu.linear_launches import LinearKey, LinearLaunches
from graftq.quant_linear.gpu.tile_heuristics import FUSED_TOKENS, Tile, shared_bytes
from graftq.quant_linear.kernels import launch
from graftq.quant_linear.spec import QuantSpec


@dataclass(frozen=True)
class Card:
    """A card of an architecture, with its maker's figures.

    Attributes:
        name: As it is sold.
        processors: Multiprocessors, or compute units.
        shared: Bytes of shared memory that one program may have.
        bandwidth: GB/s of its memory.
        issue: Instructions of a warp that all processors begin in a microsecond, at the boost clock.
    """

    name: str
    processors: int
    shared: int
    bandwidth: int
    issue: float


def _card(name: str, processors: int, kilobytes: int, bandwidth: int, gigahertz: float, per_cycle: int) -> Card:
    return Card(name, processors, kilobytes * 1024, bandwidth, processors * gigahertz * 1000 * per_cycle)


CARDS = {
    "sm_70": _card("V100", 80, 96, 900, 1.53, 4),
    "sm_75": _card("T4", 40, 64, 320, 1.59, 4),
    "sm_80": _card("A100", 108, 163, 1935, 1.41, 4),
    "sm_86": _card("RTX 3090", 82, 99, 936, 1.70, 4),
    "sm_89": _card("RTX 4090", 128, 99, 1008, 2.52, 4),
    "sm_90": _card("H100", 132, 227, 3350, 1.83, 4),
    "sm_100": _card("B200", 148, 227, 8000, 1.90, 4),
    "sm_120": _card("RTX 5090", 170, 99, 1792, 2.41, 4),
    "gfx90a": _card("MI250", 104, 64, 1638, 1.70, 1),
    "gfx942": _card("MI300X", 304, 64, 5300, 2.10, 1),
    "gfx1100": _card("RX 7900 XTX", 96, 64, 960, 2.50, 2),
    "gfx1201": _card("RX 9070 XT", 64, 64, 640, 2.97, 2),
}

LAYERS = {"dense": 4096, "experts": 8}
"""A projection of 4096 x 4096; eight experts of 2048 x 4096 and back, two for each token."""


_COUNTS = (*range(1, 130), *range(160, FUSED_TOKENS + 1, 32), FUSED_TOKENS + 1, 2048, 4096)
"""Numbers of tokens between which the choosers go from tile to tile."""


@dataclass(frozen=True)
class Job:
    """One kernel to compile, and where it comes from.

    Attributes:
        device: A name of :data:`CARDS`.
        layer, bits, dtype, sym, tokens: Of the call that asked for it first.
        kernel: Its name in :data:`KERNELS`.
        signature: Triton's type of each argument; "constexpr" for constants.
        constants: By argument.
        divisible: Arguments that are multiples of 16.
        options: For the launch.
        work: Warps' steps through the loop in that call.
        bytes: Of packed weights that the call reads.
        foreseen: Bytes of shared memory that the choice of the tile reckoned with.
    """

    device: str
    layer: str
    bits: int
    dtype: str
    sym: bool
    tokens: int
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    divisible: tuple[str, ...]
    options: tuple[tuple[str, int | bool], ...]
    work: int
    bytes: int
    foreseen: int

    @property
    def tile(self) -> str:
        """The constants that a tile decides."""
        names = ("BLOCK_N", "BLOCK_M", "UNROLL", "SPLIT_K", "SCALE_WEIGHTS", "ACTIVATION")
        found = dict(self.constants)
        shape = [f"{name.lower()}={found[name]}" for name in names if name in found]
        return " ".join([*shape, *(f"{name}={value}" for name, value in self.options)])


POINTERS = {
    "codes": "i32",
    "high": "i32",
    "zeros": "i32",
    "scales": "fp16",
    "partials": "fp32",
    "counters": "i32",
    "order": "i32",
}
POINTERS |= {"index": "i64", "slots": "i32", "tile_expert": "i32", "columns": "i32", "weights": "fp32", "rows": "fp32"}

KERNELS: dict[str, Any] = {}
"""The kernels that jobs name."""


@contextmanager
def described(name: str) -> Iterator[None]:
    """Let torch describe its CUDA device as this one."""
    card, is_hip = CARDS[name], name.startswith("gfx")
    capability = 0 if is_hip else int(name[3:])
    properties = SimpleNamespace(
        name=card.name, major=capability // 10, minor=capability % 10, multi_processor_count=card.processors,
        gcnArchName=f"{name}:sramecc+" if is_hip else card.name, shared_memory_per_block_optin=card.shared,
    )  # fmt: skip
    caches = (devices.device_of, devices.program_for)
    with (
        patch.object(torch.cuda, "get_device_properties", lambda device=None: properties),
        patch.object(torch.version, "hip", "7.0" if is_hip else None),
    ):
        for cache in caches:
            cache.cache_clear()
        yield
    for cache in caches:
        cache.cache_clear()


def jobs_for(
    name: str, layer: str, bits: int, group: int, dtype: str, sym: bool, tokens: list[int] | None = None
) -> list[Job]:
    """Each different kernel that a layer launches on a device, for any number of tokens or those given.

    Kernels that differ in the splits of K only count as one, if all of them have some.
    """
    if dtype == "bfloat16" and name in ("sm_70", "sm_75"):
        return []
    found: dict[tuple[object, ...], Job] = {}
    made: list[launch.Launch] = []
    original = launch.Launch.__init__

    def note(self: launch.Launch, *arguments: Any) -> None:
        original(self, *arguments)
        made.append(self)

    with described(name), patch.object(launch.Launch, "__init__", note):
        for count in tokens or _COUNTS:
            made.clear()
            (_dense if layer == "dense" else _experts)(bits, group, getattr(torch, dtype), sym, count)
            for each in made:
                job = _job(each, name, layer, bits, dtype, sym, count)
                constants = {key: value for key, value in job.constants if key != "SPLIT_K"}
                is_split = dict(job.constants).get("SPLIT_K", 1) != 1
                found.setdefault((job.kernel, job.signature, str(constants), job.options, is_split), job)
    return list(found.values())


def _spec(bits: int, group: int, sym: bool, k: int, n: int) -> QuantSpec:
    groups = 1 if group == 0 else k // group
    return QuantSpec(bits, k, n, group or -1, groups, False, sym, 1, k, n, 0, 0)


def _dense(bits: int, group: int, dtype: torch.dtype, sym: bool, tokens: int) -> None:
    k = n = LAYERS["dense"]
    spec, device = _spec(bits, group, sym, k, n), torch.device("cuda", 0)
    strides = (n, 0 if sym else n)
    shape = torch.Size((tokens, k))
    key = LinearKey(spec.signature, shape, (k, 1), dtype, device, k // 128, spec.num_groups, n, 0 if sym else n // 2,
                    torch.float16, None, False)  # fmt: skip
    product = LinearLaunches(key)._product
    if not hasattr(product, "_launches"):
        dequantized_weights._launch.__wrapped__(
            spec.signature, 0, 4, k // 128, spec.num_groups, strides, torch.float16, dtype, device
        )


def _experts(bits: int, group: int, dtype: torch.dtype, sym: bool, tokens: int) -> None:
    experts, hidden, inner = LAYERS["experts"], 4096, 2048
    up, down = _spec(bits, group, sym, hidden, inner), _spec(bits, group, sym, inner, hidden)
    spec = ExpertsSpec(
        tuple((name, (each,) * experts) for name, each in (("gate_proj", up), ("up_proj", up), ("down_proj", down))),
        Activation("silu"),
    )
    words = 256 * (2 if bits == 3 else bits)
    device = torch.device("cuda", 0)

    def kind(each: QuantSpec, parts: int) -> StackKind:
        shape = torch.Size((experts, each.out_features * parts // 64, each.in_features // 128, words))
        return StackKind(shape, each.num_groups, torch.float16, device, sym, None, None)

    shape = torch.Size((tokens, hidden))
    key = ops.ExpertsKey(spec.signature, shape, hidden, dtype, 2, torch.int64, torch.float32, kind(up, 2),
                         kind(down, 1))  # fmt: skip
    ops.launches_for.__wrapped__(key)


def _job(made: launch.Launch, name: str, layer: str, bits: int, dtype: str, sym: bool, tokens: int) -> Job:
    kernel = made._kernel
    KERNELS[kernel.fn.__name__] = kernel
    names, values = kernel.arg_names, made._arguments
    tensors = len(names) - len(values)
    short = {"float16": "fp16", "bfloat16": "bf16"}[dtype]
    kinds = [(each, "*" + POINTERS.get(each, short)) for each in names[:tensors]]
    constants, divisible = [], list(names[:tensors])
    for parameter, value in zip(kernel.params[tensors:], values, strict=True):
        kind = 1 if parameter.is_constexpr else launch.class_of(parameter.name, value)
        kinds.append((parameter.name, "constexpr" if kind == 1 else "i32"))
        if kind == 1:
            constants.append((parameter.name, value))
        elif kind == 16:
            divisible.append(parameter.name)
    sizes, grid = dict(zip(names[tensors:], values, strict=True)), made._grid
    steps = sizes.get("atoms", 0) // sizes.get("UNROLL", 1)
    work = grid[0] * grid[2] * steps * made._options["num_warps"]
    read = sizes.get("N", 0) * sizes.get("atoms", 0) * 128 * bits // 8 * grid[2]
    return Job(name, layer, bits, dtype, sym, tokens, kernel.fn.__name__, tuple(kinds), tuple(constants),
               tuple(divisible), tuple(made._options.items()), work, read, _foreseen(bits, sizes, made))  # fmt: skip


def _foreseen(bits: int, sizes: dict[str, Any], made: launch.Launch) -> int:
    device = devices.device_of(torch.device("cuda", 0))
    if "BLOCK_N" not in sizes:  # a kernel without a tile, whose shared memory is small on any device
        return device.shared_memory
    options, group = made._options, sizes["GROUP"]
    tile = Tile(sizes["BLOCK_N"], sizes.get("BLOCK_M", 1), sizes["UNROLL"], 1, options["num_warps"],
                options["num_stages"])  # fmt: skip
    return shared_bytes(device, bits, tile, 128 // group if 0 < group < 128 else 1)


def target_of(name: str) -> GPUTarget:
    """Triton's name of a device."""
    if name.startswith("gfx"):
        return GPUTarget("hip", name, 64 if name.startswith("gfx9") else 32)
    return GPUTarget("cuda", int(name[3:]), 32)


def describe(job: Job) -> dict[str, object]:
    """The columns of a row that are known before it is compiled."""
    return {
        "device": job.device, "layer": job.layer, "bits": job.bits, "dtype": job.dtype, "sym": int(job.sym),
        "kernel": job.kernel, "tile": job.tile, "tokens": job.tokens, "limit": CARDS[job.device].shared,
    }  # fmt: skip


def compile_job(job: Job) -> dict[str, object]:
    """A row of the table; Triton's own errors are its verdict."""
    kernel, card = KERNELS[job.kernel], CARDS[job.device]
    names = kernel.arg_names
    constants = {(names.index(name),): value for name, value in job.constants}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in job.divisible}
    source = ASTSource(kernel, dict(job.signature), constants, attributes)
    row = describe(job)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, knobs.cache.scope():
        knobs.cache.dir = folder
        try:
            compiled = triton.compile(source, target=target_of(job.device), options=dict(job.options))
        except Exception as error:
            return row | {"verdict": f"{type(error).__name__}: {str(error)[:80]}"}
        row["seconds"] = round(time.perf_counter() - started, 1)
        found = read_amd(compiled) if job.device.startswith("gfx") else read_nvidia(compiled)
    row |= found | {"shared": compiled.metadata.shared}
    row["issue_us"] = round(int(str(found["loop"])) * job.work / card.issue, 1)
    row["read_us"] = round(job.bytes / card.bandwidth / 1000, 1)
    if compiled.metadata.shared > min(card.shared, job.foreseen):
        row["verdict"] = "more shared memory than foreseen"
    else:
        row["verdict"] = "compiles"
    return row
