"""Routing puts every slot into one tile of its expert, in order, and nothing else anywhere."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")


def route(index: torch.Tensor, experts: int, tokens: int) -> list[tuple[int, list[int]]]:
    """Expert and slots of each tile that has any."""
    from graftq.quant_linear.gpu.experts.launches import InputRows, Preparation
    from graftq.quant_linear.gpu.experts.stacks import Stack, StackKind
    from graftq.quant_linear.kernels.launch import LaunchSequence

    codes = torch.empty(experts, 2, 1, 0, dtype=torch.int32, device=index.device)
    x = torch.empty(len(index), 16, dtype=torch.float16, device=index.device)
    kind = StackKind.of(Stack(codes, None, codes, None, None, None, None))
    prepare = Preparation(InputRows(len(index), 1, 16, 16), kind, "", x.dtype, False, tokens)
    sizes = {name: part.elements for name, part in prepare.parts.items()}
    out = {name: torch.empty(size, dtype=torch.int32, device=index.device) for name, size in sizes.items()}
    LaunchSequence(("x", "index", *out), {}, prepare.steps)(x, index, *out.values())
    experts_of, tiles = out["tile_expert"].tolist(), out["slots"].view(-1, tokens).tolist()
    found = []
    for expert, slots in zip(experts_of, tiles, strict=True):
        if expert >= 0:
            real = [slot for slot in slots if slot < len(index)]
            assert slots == real + [len(index)] * (tokens - len(real))
            found.append((expert, real))
    return found


CASES = {
    "one slot": (torch.tensor([2]), 3),
    "even": (torch.arange(40) % 5, 5),
    "one expert": (torch.full((50,), 3), 4),
    "last expert": (torch.full((33,), 3), 4),
    "nobody's": (torch.tensor([7, 0, -1, 9, 1, 2]), 2),
    "only nobody's": (torch.full((17,), 4), 4),
    "more experts than slots": (torch.tensor([19, 3, 19, 11]), 20),
    "several chunks": (torch.randint(0, 6, (2100,), generator=torch.Generator().manual_seed(0)), 5),
    "int32": (torch.tensor([1, 0, 1], dtype=torch.int32), 2),
}


@pytest.mark.parametrize("tokens", [16, 64])
@pytest.mark.parametrize("name", CASES)
def test_every_slot_once(name: str, tokens: int, device: str):
    index, experts = CASES[name]
    found = route(index.to(device), experts, tokens)
    for expert in range(experts):
        slots = [slot for owner, tile in found if owner == expert for slot in tile]
        assert slots == torch.where(index == expert)[0].tolist()
        assert sum(owner == expert for owner, _ in found) == -(-len(slots) // tokens)
