"""The quantised linear layer on a CPU, as operators of ``torch.ops.graftq`` that ``torch.compile`` sees whole.

Few tokens go through torch's int4 and int8 kernels, which read the weights as they are and compute in bf16 with float32
sums. Many tokens, and float32, go through tiles: some output rows are dequantised into a workspace and multiplied there.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from graftq.quant_linear.cpu_tiles import Weights, multiply_tiles, multiply_tiles_transposed

_FEW_TOKENS = {(4, torch.bfloat16): 40, (8, torch.bfloat16): 16, (4, torch.float32): 16, (8, torch.float32): 16}
"""Most tokens that the kernels are faster for, by nibbles or bytes and the dtype that tiles are multiplied in."""

_WEIGHTS = (
    "Tensor codes, Tensor scales_and_zeros, Tensor groups, Tensor scales, Tensor qzeros, Tensor? order, Tensor? bias, "
    "int bits, bool sym, int zero_offset"
)
_library = torch.library.Library("graftq", "FRAGMENT")
_library.define(f"cpu_linear(Tensor x, {_WEIGHTS}, int out_features) -> Tensor")
_library.define(f"cpu_linear_input_grad(Tensor grad, {_WEIGHTS}, int in_features) -> Tensor")
_library.define(f"cpu_experts_linear(Tensor x, Tensor index, {_WEIGHTS}, int out_features) -> Tensor")
_library.define(f"cpu_experts_linear_input_grad(Tensor grad, Tensor index, {_WEIGHTS}, int in_features) -> Tensor")


@lru_cache(maxsize=1)
def int4_block() -> int | None:
    """Output rows that torch's int4 kernel packs side by side on this machine; None if it cannot be used.

    Asked of the kernel itself, by a small product: the order of the nibbles depends on the instruction set, and the
    kernel on the version of torch.
    """
    try:
        pack, multiply = torch.ops.aten._convert_weight_to_int4pack_for_cpu, torch.ops.aten._weight_int4pack_mm_for_cpu
        codes = (torch.arange(128 * 64, device="cpu") * 7 // 3 % 16).view(128, 64).to(torch.int32)
        packed = pack(codes, 1)
        for block in (64, 32):
            low, high = codes.view(-1, 2, block // 2, 64).permute(1, 0, 3, 2)
            if packed.flatten().equal((high << 4 | low).to(torch.uint8).flatten()):
                x = torch.eye(64, device="cpu", dtype=torch.bfloat16)[:5] * 2
                scales_and_zeros = torch.tensor([0.5, 3.0], device="cpu", dtype=torch.bfloat16).expand(2, 128, 2)
                found = multiply(x, packed, 32, scales_and_zeros.contiguous())
                return block if found.float().equal((codes.T[:5] - 8.0) + 6) else None
    except (AttributeError, RuntimeError, NotImplementedError):
        pass
    return None


@lru_cache(maxsize=1)
def has_int8_kernel() -> bool:
    """Whether torch's int8 kernel can be used on this machine, asked of it by a small product."""
    try:
        codes = (torch.arange(24 * 32, device="cpu") % 251 - 128).view(24, 32).to(torch.int8)
        x = torch.eye(32, device="cpu", dtype=torch.bfloat16)[:5] * 2
        scales = torch.full((24,), 0.5, device="cpu", dtype=torch.bfloat16)
        found = torch.ops.aten._weight_int8pack_mm(x, codes, scales)
        return found.float().equal(codes.T[:5].float())
    except (AttributeError, RuntimeError, NotImplementedError):
        return False


@lru_cache(maxsize=1)
def _fast_dtype() -> torch.dtype:
    """What tiles for bf16 and fp16 models are multiplied in: bf16 is slower than float32 without AVX-512."""
    capability = torch.backends.cpu.get_cpu_capability()
    fast = capability.startswith("AVX512") and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


@@MID@@class CpuLinear(torch.autograd.Function):
    """``cpu_linear`` with a gradient to the activations; the weights are frozen."""

    @staticmethod
    def forward(ctx, x, *arguments):
        """Arguments as for ``cpu_linear``."""
        ctx.save_for_backward(*arguments[:7])
        ctx.numbers = (*arguments[7:-1], x.shape[1])
        return torch.ops.graftq.cpu_linear(x, *arguments)

    @staticmethod
    def backward(ctx, grad):
        """To ``x`` alone."""
        dx = torch.ops.graftq.cpu_linear_input_grad(grad, *ctx.saved_tensors, *ctx.numbers)
        return (dx, *[None] * 11)


class CpuExpertsLinear(torch.autograd.Function):
    """``cpu_experts_linear`` with a gradient to the activations; the weights are frozen."""

    @staticmethod
    def forward(ctx, x, *arguments):
        """Arguments as for ``cpu_experts_linear``."""
        ctx.save_for_backward(*arguments[:8])
        ctx.numbers = (*arguments[8:-1], x.shape[1])
        return torch.ops.graftq.cpu_experts_linear(x, *arguments)

    @staticmethod
    def backward(ctx, grad):
        """To ``x`` alone."""
        dx = torch.ops.graftq.cpu_experts_linear_input_grad(grad, *ctx.saved_tensors, *ctx.numbers)
        return (dx, *[None] * 12)


_library.impl("cpu_linear", _linear, "CompositeExplicitAutograd")
_library.impl("cpu_linear_input_grad", _input_grad, "CompositeExplicitAutograd")
_library.impl("cpu_experts_linear", _experts_linear, "CompositeExplicitAutograd")
_library.impl("cpu_experts_linear_input_grad", _experts_input_grad, "CompositeExplicitAutograd")


@torch.library.register_fake("graftq::cpu_linear", lib=_library)
@torch.library.register_fake("graftq::cpu_linear_input_grad", lib=_library)
def _(x: torch.Tensor, *arguments: object) -> torch.Tensor:
    return x.new_empty(x.shape[0], arguments[-1])  # type: ignore[call-overload]


@torch.library.register_fake("graftq::cpu_experts_linear", lib=_library)
def _(x: torch.Tensor, index: torch.Tensor, *arguments: object) -> torch.Tensor:
    return x.new_empty(*index.shape, arguments[-1])  # type: ignore[call-overload]


@torch.library.register_fake("graftq::cpu_experts_linear_input_grad", lib=_library)
def _(grad: torch.Tensor, index: torch.Tensor, *arguments: object) -> torch.Tensor:
    return grad.new_empty(grad.shape[0], arguments[-1])  # type: ignore[call-overload]
