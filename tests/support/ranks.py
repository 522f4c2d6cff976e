"""What each of two processes does in the tests of tensor parallelism; rank 0 prints the findings as JSON.

Run, as by ``torchrun``, with a file that holds, by name, what to do and the checkpoint to do it with.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from graftq.quant_linear.experts import QuantExperts
from graftq.quant_linear.linear import QuantLinear
from support.examples import run_example
from support.loading import load
from support.models import logits, relative_error


def distributed(checkpoint: str, **arguments: Any) -> Any:
    from transformers.distributed import DistributedConfig

    plan = DistributedConfig(tp_size=dist.get_world_size(), **arguments)
    return load(checkpoint, distributed_config=plan)


def gradient(model: Any) -> torch.Tensor:
    embeddings = torch.randn(
        2, 7, model.config.hidden_size, generator=torch.Generator().manual_seed(2)
    ).requires_grad_()
    model(inputs_embeds=embeddings).logits.square().sum().backward()
    assert embeddings.grad is not None
    return embeddings.grad


def compare(checkpoint: str, **arguments: Any) -> dict[str, Any]:
    """The logits and gradients of one process against those of all together, and a rank's share of the weights."""
    whole, part = load(checkpoint), distributed(checkpoint, **arguments)
    sizes = [sum(codes(model)) for model in (whole, part)]
    return {
        "logits": relative_error(logits(part), logits(whole)),
        "gradients": relative_error(gradient(part), gradient(whole)),
        "share": sizes[1] / sizes[0],
    }


def codes(model: Any) -> list[int]:
    """The number of codes of each packed projection."""
    found = []
    for module in model.modules():
        if isinstance(module, QuantExperts):
            specs = [spec for _, own in module.spec.projections for spec in own]
        elif isinstance(module, QuantLinear) and not any(module in e.modules() for e in experts_of(model)):
            specs = [module.spec]
        else:
            continue
        found += [spec.in_features * spec.out_features for spec in specs]
    return found


def experts_of(model: Any) -> list[QuantExperts]:
    return [module for module in model.modules() if isinstance(module, QuantExperts)]


def refusal(action: Callable[[], Any]) -> str:
    try:
        action()
    except ValueError as error:
        return str(error)
    return ""


EXPERTS = {"model.layers.*.mlp.experts": "moe_tp_experts"}
EXPERTS_AND_OUTPUT = {"model.layers.*.self_attn.o_proj": "rowwise_split_input", **EXPERTS}

DEEDS: dict[str, Callable[[str], Any]] = {
    "compare": compare,
    "compare by a plan of experts": lambda checkpoint: compare(checkpoint, tp_plan=EXPERTS),
    "compare by a plan of experts and output": lambda checkpoint: compare(checkpoint, tp_plan=EXPERTS_AND_OUTPUT),
    "save": lambda checkpoint: refusal(lambda: distributed(checkpoint).save_pretrained(Path(checkpoint, "saved"))),
    "dequantize": lambda checkpoint: refusal(lambda: distributed(checkpoint).dequantize()),
    "load": lambda checkpoint: refusal(lambda: distributed(checkpoint)),
    "packed_colwise": lambda checkpoint: refusal(
        lambda: distributed(checkpoint, tp_plan={"model.layers.*.mlp.up_proj": "packed_colwise"})
    ),
}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    tasks = json.loads(Path(sys.argv[1]).read_text())
    findings = {name: DEEDS[deed](checkpoint) for name, (deed, checkpoint) in tasks.items()}
    is_first = dist.get_rank() == 0
    findings["example"] = run_example("tensor_parallel.py")  # which destroys the process group
    if is_first:
        print("FOUND", json.dumps(findings))
