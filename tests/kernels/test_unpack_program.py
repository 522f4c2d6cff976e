"""The inline assembly, run by a small interpreter of the PTX it uses: a machine without a GPU checks every code."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from graftq.quant_linear.kernels.unpack import unpack_program

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def halves(register: np.uint32, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(np.array([register], dtype=np.uint32).view(np.int16).copy()).view(dtype)


def pair(values: torch.Tensor) -> np.uint32:
    return values.view(torch.int16).numpy().view(np.uint32)[0]


def execute(program: str, operands: dict[str, np.uint32], dtype: torch.dtype) -> dict[str, np.uint32]:
    """Registers after ``program``; products are rounded once, as fused operations on exact values are."""
    registers = dict(operands)

    def read(name: str) -> np.uint32:
        return np.uint32(int(name, 0)) if name[0].isdigit() else registers[name]

    body = re.fullmatch(r"\{ \.reg \.b32 [^;]*; (.*) \}", program)
    assert body
    for statement in filter(None, (part.strip() for part in body[1].split(";"))):
        operation, rest = statement.split(" ", 1)
        target, *names = (name.strip() for name in rest.split(","))
        values = [read(name) for name in names]
        if operation == "mov.b32":
            registers[target] = values[0]
        elif operation == "and.b32":
            registers[target] = values[0] & values[1]
        elif operation == "shr.u32":
            registers[target] = values[0] >> values[1]
        elif operation == "shl.b32":
            registers[target] = np.uint32(int(values[0]) << int(values[1]) & 0xFFFFFFFF)
        elif operation == "lop3.b32":
            assert values[3] == 0xEA
            registers[target] = (values[0] & values[1]) | values[2]
        else:
            assert operation in ("fma.rn.f16x2", "fma.rn.bf16x2")
            a, b, c = (halves(value, dtype).double() for value in values)
            registers[target] = pair((a * b + c).to(dtype))
    return registers


def words_of(codes: np.ndarray, bits: int) -> np.uint32:
    """Codes [planes, 2] to a register of two words."""
    return np.uint32(sum(int(code) << (16 * word + plane * bits) for (plane, word), code in np.ndenumerate(codes)))


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("stored", ["built-in", "operand"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_plane_reads_its_code_exactly(bits: int, dtype: str, stored: str, half: int):
    planes, rng = 16 // (2 if bits == 3 else bits), np.random.default_rng(bits)
    for zero in (0, 1, 2 ** (bits - 1), 2**bits - 1, 2**bits):
        codes = rng.integers(0, 2**bits, (planes, 2))
        program = unpack_program(bits, dtype, zero if stored == "built-in" else None)
        operands = {f"${planes}": words_of(codes & 3 if bits == 3 else codes, 2 if bits == 3 else bits)}
        operands[f"${planes + 1}"] = pair(torch.tensor([zero, zero]).to(DTYPES[dtype]))
        top = 0
        for (plane, word), code in np.ndenumerate(codes >> 2):
            top |= int(code) << (16 * word + plane // 2 * 4 + 2 + plane % 2 - 2 * half)
        others = 0x33333333 if half == 0 else 0xCCCCCCCC  # the other half's top bits, which must not matter
        operands[f"${planes + 2}"] = np.uint32(top | (rng.integers(0, 2**32) & others))
        operands[f"${planes + 3}"] = np.uint32(0x00020002 * half)
        registers = execute(program, operands, DTYPES[dtype])
        read = torch.stack([halves(registers[f"${plane}"], DTYPES[dtype]) for plane in range(planes)])
        assert torch.equal(read.double(), torch.from_numpy(codes - zero).double())
