"""Random projections in the checkpoint's format, and what they should compute, for the tests of kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from graftq.quant_linear.layouts import GptqTensors
from graftq.quant_linear.packing import dequantize, pack_codes
from graftq.quant_linear.spec import QuantSpec


@dataclass(frozen=True)
class Shape:
    """One projection to make up; ``group`` as in ``quantize_config.json``, -1 for a single one."""

    bits: int = 4
    k: int = 256
    n: int = 128
    group: int = 128
    act_order: bool = False
    sym: bool = True
    zero_offset: int = 1
    scales: torch.dtype = torch.float16
    bias: bool = False

    def __str__(self) -> str:
        order = "act" if self.act_order else "seq"
        symmetry = "sym" if self.sym else f"asym+{self.zero_offset}"
        dtype = str(self.scales).removeprefix("torch.")
        extra = "-bias" if self.bias else ""
        return f"{self.bits}bit-{self.group}g-{order}-{symmetry}-{self.k}x{self.n}-{dtype}{extra}"

    def spec(self) -> QuantSpec:
        """Its description."""
        group_size = self.k if self.group == -1 else self.group
        return QuantSpec(
            bits=self.bits,
            in_features=self.k,
            out_features=self.n,
            group_size=group_size,
            num_groups=-(-self.k // group_size),
            desc_act=self.act_order,
            sym=self.sym,
            zero_offset=self.zero_offset,
            padded_in=self.k,
            padded_out=self.n,
            stored_g_idx=self.k if self.act_order else 0,
            stored_bias=self.n if self.bias else 0,
        )


def make(
    shape: Shape, seed: int = 0, device: str = "cpu", codes: int | None = None, scale: float = 0.01
) -> GptqTensors:
    """Fill a projection: random codes (or all equal ``codes``), scales around ``scale``, of both signs if below 0."""
    generator = torch.Generator().manual_seed(seed)
    spec, levels = shape.spec(), 2**shape.bits
    q = torch.randint(0, levels, (shape.k, shape.n), generator=generator, dtype=torch.uint8)
    if codes is not None:
        q.fill_(codes)
    zeros = torch.randint(0, levels, (spec.num_groups, shape.n), generator=generator)
    if shape.sym:
        zeros.fill_(levels // 2 - shape.zero_offset)
    scales = (torch.rand(spec.num_groups, shape.n, generator=generator) + 0.5) * scale
    if scale < 0:
        scales[:, ::2] *= -1
    g_idx = None
    if shape.act_order:
        shuffled = torch.randperm(shape.k, generator=generator)
        g_idx = (torch.arange(shape.k) // spec.group_size)[shuffled].to(torch.int32)
    bias = torch.randn(shape.n, generator=generator).to(shape.scales) if shape.bias else None
    tensors = GptqTensors(
        pack_codes(q, shape.bits), pack_codes(zeros.T, shape.bits).T.contiguous(), scales.to(shape.scales), g_idx, bias
    )
    return GptqTensors(*(None if tensor is None else tensor.to(device) for tensor in vars(tensors).values()))


def expected(x: torch.Tensor, tensors: GptqTensors, spec: QuantSpec) -> torch.Tensor:
    """``x @ W.T + bias`` from float32 weights, summed in float64."""
    out = x.double() @ dequantize(tensors, spec).double().T
    return out if tensors.bias is None else out + tensors.bias[: spec.out_features].double()


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """``||out - reference|| / ||reference||``; NaN if ``out`` has one."""
    return ((out.double() - reference).norm() / reference.norm()).item()
