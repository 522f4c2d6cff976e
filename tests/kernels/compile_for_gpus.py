"""Compile every kind of kernel for GPUs that need not be there. Run by test_compiles; not in the interpreter."""

from __future__ import annotations

import re
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from graftq.quant_linear.kernels.columns import round_kernel
from graftq.quant_linear.kernels.dequant import dequantize_kernel
from graftq.quant_linear.kernels.experts_gemm import experts_matrix_kernel
from graftq.quant_linear.kernels.experts_gemv import down_vector_kernel, up_vector_kernel
from graftq.quant_linear.kernels.experts_prepare import prepare_kernel
from graftq.quant_linear.kernels.experts_sum import weighted_sum_kernel
from graftq.quant_linear.kernels.gemm import matrix_kernel
from graftq.quant_linear.kernels.gemv import vector_kernel
from graftq.quant_linear.kernels.pack import pack_kernel
from graftq.quant_linear.kernels.scales import search_kernel
from graftq.quant_linear.kernels.unpack import unpack_program

POINTERS = {"x": "*{}", "out": "*{}", "bias": "*{}", "codes": "*i32", "high": "*i32", "scales": "*fp16"}
POINTERS |= {"zeros": "*i32", "partials": "*fp32", "counters": "*i32", "order": "*i32", "gathered": "*{}"}
POINTERS |= {
    "index": "*i64",
    "slots": "*i32",
    "tile_expert": "*i32",
    "columns": "*i32",
    "weights": "*fp32",
    "rows": "*fp32",
    "qweight": "*i32",
    "source": "*i64",
}
TILES = {"vector_kernel": (64, 1, 2), "matrix_kernel": (64, 16, 1, 2), "dequantize_kernel": ()}
TILES |= {
    "up_vector_kernel": (64, 2, 4, 8),
    "down_vector_kernel": (64, 2, 3, 8),
    "experts_matrix_kernel": (64, 16, 1, 2),
}
TILES |= {"prepare_kernel": (), "weighted_sum_kernel": (), "pack_kernel": (), "round_kernel": (), "search_kernel": ()}
GATED = {"ACTIVATION": "silu", "GATED": True, "HAS_BIAS": True}


MATRIX = {
    75: ("ptx", ""),
    86: ("ptx", "mma.sync.aligned.m16n8k16"),
    90: ("ptx", "wgmma.mma_async"),
    "gfx942": ("amdgcn", "v_mfma"),
    "gfx1100": ("amdgcn", "v_wmma"),
    "gfx1201": ("amdgcn", "v_wmma"),
}
"""By architecture, in which of Triton's texts a product's matrix instruction stands; sm_75 has none."""


def build(
    kernel: triton.JITFunction,
    architecture: int | str,
    dtype: str,
    bits: int,
    group: int,
    sym: bool,
    **changes: object,
) -> Any:
    """Compile ``kernel`` for an NVIDIA GPU of a compute capability, or for an AMD GPU by its name."""
    capability = architecture if isinstance(architecture, int) else 0
    names = kernel.arg_names
    tile = TILES[kernel.fn.__name__]
    constants: dict[str, object] = dict.fromkeys((name for name in names if name.isupper() and len(name) > 1), False)
    constants |= {"BITS": bits, "GROUP": group, "SYM": sym, "OVERLAP": capability >= 90}
    constants |= {"AFTER_UP": capability >= 90}
    constants |= {
        "PROGRAM": unpack_program(bits, dtype, 2 ** (bits - 1) if sym else None),
        "ALPHA": 1.702,
        "LIMIT": 7.0,
    }
    constants |= dict(zip([name for name in names if name.isupper()][-len(tile) :], tile, strict=True)) if tile else {}
    constants = {name: value for name, value in (constants | changes).items() if name in names}
    signature = {name: POINTERS.get(name, "i32").format(dtype) for name in names}
    if kernel is round_kernel:
        floats = ("values", "target", "unit", "scales", "zeros", "centered", "errors")
        signature |= {**dict.fromkeys(floats, "*fp32"), "groups": "*i64", "columns": "i32"}
    if kernel is search_kernel:
        floats = ("weight", "importance", "low", "factors", "scales", "zeros")
        signature |= {**dict.fromkeys(floats, "*fp32"), "columns": "i32"}
    signature = {name: kind for name, kind in signature.items() if name in names} | dict.fromkeys(
        constants, "constexpr"
    )
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in signature if name not in constants}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, aligned)
    target = GPUTarget("cuda", capability, 32)
    if isinstance(architecture, str):
        target = GPUTarget("hip", architecture, 64 if architecture.startswith("gfx9") else 32)
    compiled = triton.compile(source, target=target, options={"num_warps": 4})
    assert "local_depot" not in compiled.asm.get("ptx", ""), (kernel.fn.__name__, bits, "arrays in local memory")
    return compiled


def check_instructions() -> None:
    """The matrix instructions that ``Device.matrix_units`` promises are there, and loads of 16 bytes."""
    for architecture, (text, instruction) in MATRIX.items():
        changes = {} if architecture in (86, 90) else {"PROGRAM": ""}
        compiled = build(matrix_kernel, architecture, "fp16", 4, 128, True, **changes)
        code = compiled.asm[text]
        wide = (
            r"(global|buffer)_load_(b128|dwordx4)"
            if text == "amdgcn"
            else r"ld\.global\S*\.v4\.b32|cp\.async\S* .*, 0x10"
        )
        assert re.search(wide, code), (architecture, "no load of 16 bytes")
        if instruction:
            assert instruction in code, (architecture, instruction)
        else:
            assert not re.search(r"\bw?g?mma\b", code), (architecture, "matrix instructions")


def main() -> None:
    check_instructions()
    for bits in (2, 3, 4, 8):
        for kernel in (vector_kernel, matrix_kernel, dequantize_kernel):
            build(kernel, 90, "fp16", bits, 128, True)
        build(matrix_kernel, 90, "bf16", bits, 32, False)
        build(vector_kernel, 80, "bf16", bits, 0, False)

        build(pack_kernel, 90, "fp16", bits, 128, True)
        build(up_vector_kernel, 90, "fp16", bits, 128, True, **GATED, AFTER_GATHER=True)
        build(experts_matrix_kernel, 90, "fp16", bits, 128, True, **GATED)
    build(vector_kernel, 75, "fp16", 3, 128, False, PROGRAM="")
    build(up_vector_kernel, 80, "bf16", 3, 0, False, **GATED)
    build(down_vector_kernel, 90, "fp16", 4, 128, True, HAS_BIAS=True)
    build(down_vector_kernel, 80, "bf16", 3, 0, False)
    build(experts_matrix_kernel, 80, "bf16", 3, 32, False, **GATED)
    for activation in ("gelu", "gelu_tanh", "relu", "relu2", "swiglu_oai"):
        build(experts_matrix_kernel, 90, "bf16", 4, 0, True, ACTIVATION=activation, GATED=True)
    for activation in ("silu", ""):
        build(experts_matrix_kernel, 80, "fp16", 4, 128, False, ACTIVATION=activation)
    build(round_kernel, 80, "fp32", 4, 128, True, TOP=15, OUTPUTS=32, BLOCK=128)
    for sym in (True, False):
        candidates = {"SYM": sym, "ROUNDINGS": 2 if sym else 3, "STEPS": 48, "SMALLEST": 2.0**-14, "LARGEST": 65504.0}
        build(search_kernel, 90, "fp32", 3, 128, sym, **candidates, MIDDLE=4, TOP=7, OUTPUTS=32, BLOCK=128)
    for capability, route in ((90, True), (80, False)):
        build(prepare_kernel, capability, "fp16", 4, 128, True, ROUTE=route, BLOCK_M=64, CHUNK=1024, BLOCK=256)
        build(weighted_sum_kernel, capability, "bf16", 4, 128, True, HAS_BIAS=route, BLOCK=1024, SPLIT_K=2, TOP_K=16)


if __name__ == "__main__":
    main()
