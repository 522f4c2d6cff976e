"""``torch.nn.DataParallel``, which transformers' Trainer puts around a model when it sees two GPUs.

torch's own ``replicate`` is used; where there are no two GPUs, copies stand in for its broadcast.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.loading import load
from support.models import relative_error
from support.repacking import repacked  # noqa: F401 - a fixture

IDS = torch.randint(3, 96, (2, 11), generator=torch.Generator().manual_seed(1))


class Copy(torch.autograd.Function):
    """What broadcasting is to autograd: gradients of all copies add up."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


@pytest.fixture
def replicas(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    module = importlib.import_module("torch.nn.parallel.replicate")

    def broadcast(tensors: Any, devices: list[int], detach: bool = False) -> list[list[torch.Tensor]]:
        return [[t.detach().clone() if detach else Copy.apply(t) for t in tensors] for _ in devices]

    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", broadcast)
    return lambda model, detach=True: module.replicate(model, [0, 1], detach=detach)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize("kernel", ["cpu", "torch", "rearranged"])
def test_every_replica_is_right(
    kernel: str,
    name: str,
    originals: dict[str, Path],
    replicas: Any,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    if kernel == "rearranged":
        request.getfixturevalue("repacked")
    else:
        monkeypatch.setenv("GRAFTQ_KERNEL", kernel)
    model = load(originals[name])
    with torch.no_grad():
        wanted = load(originals[name].parent / "float")(IDS).logits
        for _ in range(2):  # replicas are made anew for every batch
            assert all(relative_error(replica(IDS).logits, wanted) < 1e-5 for replica in replicas(model))
        assert relative_error(model(IDS).logits, wanted) < 1e-5


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_replica_rearranges_its_own_tensors(
    name: str, originals: dict[str, Path], replicas: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where the model was bound to a kernel for CPUs before it was moved there."""
    model = load(originals[name])
    monkeypatch.setenv("GRAFTQ_KERNEL", "torch")
    for module in model.modules():
        if hasattr(module, "_bound_to"):
            module._bound_to = None
    with torch.no_grad():
        wanted = load(originals[name].parent / "float")(IDS).logits
        for _ in range(2):
            assert all(relative_error(replica(IDS).logits, wanted) < 1e-5 for replica in replicas(model))


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("llama", {"target_modules": ["q_proj", "down_proj"]}),
        ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
    ],
    ids=["layers", "experts"],
)
@pytest.mark.filterwarnings(r"ignore:`\w*gradient_checkpointing\w*` is deprecated")
def test_gradients_of_adapters(name: str, targets: dict[str, Any], originals: dict[str, Path], replicas: Any) -> None:
    """Each replica has one row of the batch; together they learn what one model learns from both."""
    torch.manual_seed(0)
    model = get_peft_model(load(originals[name]), LoraConfig(r=4, init_lora_weights=False, **targets))
    alone = copy.deepcopy(model)
    alone(IDS).logits.square().sum().backward()
    for replica, row in zip(replicas(model, detach=False), IDS, strict=True):
        replica(row[None]).logits.square().sum().backward()
    wanted = {name: tensor.grad for name, tensor in alone.named_parameters() if tensor.grad is not None}
    found = {name: tensor.grad for name, tensor in model.named_parameters() if tensor.grad is not None}
    assert found.keys() == wanted.keys() != set()
    assert all(relative_error(found[name], wanted[name]) < 1e-4 for name in wanted)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no two GPUs here")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_two_gpus(name: str, dtype: torch.dtype, originals: dict[str, Path]) -> None:
    wanted = load(originals[name].parent / "float")(IDS).logits.detach()
    for first in ("cpu", "cuda:0"):
        model = load(originals[name], dtype=dtype, device_map={"": first}).to("cuda:0")
        parallel = torch.nn.DataParallel(model, [0, 1])
        with torch.no_grad():
            for _ in range(2):
                found = parallel(IDS.cuda()).logits.float().cpu()
                assert relative_error(found, wanted) < (1e-2 if dtype == torch.float16 else 1e-4)
