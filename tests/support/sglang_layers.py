"""Layers of SGLang's stand-in, created and filled as SGLang does it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from support.served_checkpoint import EXPERT, ServedCheckpoint
from support.sglang_stand_in import FusedMoE, HookRegistry


def hook(name: str) -> Callable[..., Any]:
    """What graftq has hung on a function of SGLang's model loader."""
    return HookRegistry.hooks[f"sglang.srt.model_loader.{name}"][0]


class Checkpoint(ServedCheckpoint):
    """The same, and a configuration that has looked at it."""

    def config(self) -> Any:
        """Write the files, and let SGLang's loader make the configuration and say where they are."""
        from graftq.adapters.sglang.config import GraftqConfig

        self.write()
        config = GraftqConfig.from_config({**self.recipe.config(), "packed_modules_mapping": {}, "hf_config": None})
        model = SimpleNamespace(model_path=str(self.folder), revision=None)
        hook("weight_utils.get_quant_config")(config, model, SimpleNamespace(download_dir=None), {}, None)
        return config


def create(
    method: Any, layer: Any, inputs: int, sizes: Sequence[int], whole: tuple[int, int], dtype: torch.dtype
) -> None:
    """Call ``create_weights`` as SGLang's linear layers do."""
    method.create_weights(
        layer=layer,
        input_size_per_partition=inputs,
        output_partition_sizes=list(sizes),
        input_size=whole[0],
        output_size=whole[1],
        params_dtype=dtype,
        skip_block_quant_check=False,
        weight_loader=None,
    )


def linear_layer(
    config: Any,
    prefix: str,
    layer: Any,
    k: tuple[int, int],
    sizes: Sequence[int],
    ranks: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """A layer with its method; ``k`` is this rank's inputs and all, ``sizes`` are this rank's outputs."""
    layer.quant_method = config.get_quant_method(layer, prefix)
    create(layer.quant_method, layer, k[0], sizes, (k[1], ranks * sum(sizes)), dtype)
    return layer


def answer(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """What a layer gives once it is loaded."""
    layer.quant_method.process_weights_after_loading(layer)
    return layer.quant_method.apply(layer, x, None)


def experts_layer(
    checkpoint: Checkpoint,
    prefix: str,
    total: int,
    mine: range,
    rank: int = 0,
    ranks: int = 1,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    **changes: Any,
) -> Any:
    """The experts ``mine`` out of ``total``, cut for a rank; loaded. ``changes`` are to SGLang's settings of them."""
    hidden, inner = checkpoint.weights[f"{prefix}.0.down_proj"].shape
    with torch.device(device):
        layer = FusedMoE(prefix, mine, total, rank, ranks, **changes)
        layer.quant_method = checkpoint.config().get_quant_method(layer, prefix)
        layer.quant_method.create_weights(
            layer=layer,
            num_experts=len(mine),
            hidden_size=hidden,
            intermediate_size_per_partition=inner // ranks,
            params_dtype=dtype,
            weight_loader=None,
            with_bias=False,
            moe_intermediate_size=inner,
        )
        layer.quant_method.create_moe_runner(layer, layer.moe_runner_config)
    for expert in range(total):
        for name, shard in EXPERT.items():
            checkpoint.hand_over_expert(layer, f"{prefix}.{expert}.{name}", shard, expert)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def dispatched(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, mine: range) -> Any:
    """What SGLang's dispatcher hands to experts: their numbers are this rank's, and -1 for those of others."""
    local = torch.where((ids >= mine.start) & (ids < mine.stop), ids - mine.start, -1)
    chosen = SimpleNamespace(topk_weights=weights, topk_ids=local, router_logits=None)
    return SimpleNamespace(hidden_states=x, topk_output=chosen)


def model_of(**layers: Any) -> torch.nn.Module:
    """A model that has these layers; two underscores in a name stand for a dot."""
    model = torch.nn.Module()
    for path, layer in layers.items():
        *parents, last = path.split("__")
        at = model
        for parent in parents:
            if not hasattr(at, parent):
                at.add_module(parent, torch.nn.Module())
            at = getattr(at, parent)
        at.add_module(last, layer)
    return model
