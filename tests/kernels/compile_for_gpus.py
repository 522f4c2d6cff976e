"""Compile every kind of kernel for NVIDIA GPUs that need not be there. Run by test_compiles; not in the interpreter."""

from __future__ import annotations

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from graftq.quant_linear.kernels.dequant import dequantize_kernel
from graftq.quant_linear.kernels.gemm import matrix_kernel
from graftq.quant_linear.kernels.gemv import vector_kernel
from graftq.quant_linear.kernels.unpack import unpack_program

POINTERS = {"x": "*{}", "out": "*{}", "bias": "*{}", "codes": "*i16", "high": "*i16", "scales": "*fp16"}
POINTERS |= {"zeros": "*i32", "partials": "*fp32", "counters": "*i32"}
TILES = {"vector_kernel": (64, 1, 2), "matrix_kernel": (64, 16, 1, 2), "dequantize_kernel": ()}


def build(kernel: triton.JITFunction, capability: int, dtype: str, bits: int, group: int, sym: bool) -> None:
    names = kernel.arg_names
    constants = dict.fromkeys((name for name in names if name.isupper()), False)
    constants |= {"BITS": bits, "GROUP": group, "SYM": sym, "ZERO_OFFSET": 1}
    constants["PROGRAM"] = unpack_program(bits, dtype, 2 ** (bits - 1) if sym else None)
    tile = TILES[kernel.fn.__name__]
    constants |= dict(zip([name for name in names if name.isupper()][-len(tile) :], tile, strict=True)) if tile else {}
    signature = {name: POINTERS.get(name, "i32").format(dtype) for name in names}
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
    assert "local_depot" not in compiled.asm["ptx"], (kernel.fn.__name__, bits, "arrays in local memory")


def main() -> None:
    for bits in (2, 3, 4, 8):
        for kernel in (vector_kernel, matrix_kernel, dequantize_kernel):
            build(kernel, 90, "fp16", bits, 128, True)
        build(matrix_kernel, 90, "bf16", bits, 32, False)
        build(vector_kernel, 80, "bf16", bits, 0, False)


if __name__ == "__main__":
    main()
