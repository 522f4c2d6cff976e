"""Small stand-ins for what the server hands to a weights loader, with its names and signatures.

Copied from no one: they answer as ``text_generation_server.utils.weights`` documents, and hold tensors in memory.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import safe_open
from support.undoing import undoing


@dataclass
class Group:
    """A process group that only knows its place."""

    own: int = 0
    ranks: int = 1

    def rank(self) -> int:
        return self.own

    def size(self) -> int:
        return self.ranks


class UnquantizedWeight:
    def __init__(self, weight: torch.Tensor):
        self.weight = weight

    def get_linear(self, bias: torch.Tensor | None) -> torch.nn.Module:
        linear = torch.nn.Linear(*self.weight.shape[::-1], bias=bias is not None)
        linear.weight.data = self.weight
        if bias is not None:
            linear.bias.data = bias
        return linear.requires_grad_(False)


class DefaultWeightsLoader:
    def __init__(self, weight_class: type):
        self.weight_class = weight_class

    def get_weights(self, weights: Weights, prefix: str) -> torch.Tensor:
        return weights.get_tensor(f"{prefix}.weight")

    def get_weights_col_packed(self, weights: Weights, prefix: str, block_sizes: Any) -> Any:
        raise NotImplementedError

    def get_multi_weights_col(self, weights: Weights, prefixes: Sequence[str], dim: int) -> Any:
        whole = [weights.get_tensor(f"{prefix}.weight") for prefix in prefixes]
        return self.weight_class(torch.cat([weights.share(one, 0) for one in whole], dim))

    def get_weights_row(self, weights: Weights, prefix: str) -> Any:
        return self.weight_class(weights.share(weights.get_tensor(f"{prefix}.weight"), 1))


@dataclass
class Weights:
    """The tensors of one file."""

    file: Path
    weights_loader: Any
    process_group: Group = field(default_factory=Group)
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    prefix: str | None = None

    def __post_init__(self) -> None:
        with safe_open(self.file, framework="pt") as handle:
            self.tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - not a mapping

    @property
    def loader(self) -> Any:
        return self.weights_loader

    def get_filename(self, tensor_name: str) -> tuple[str, str]:
        if tensor_name not in self.tensors:
            raise RuntimeError(f"weight {tensor_name} does not exist")
        return str(self.file), tensor_name

    def has_tensor(self, tensor_name: str) -> bool:
        return tensor_name in self.tensors

    def get_tensor(self, tensor_name: str, to_device: bool = True, to_dtype: bool = True) -> torch.Tensor:
        self.get_filename(tensor_name)
        tensor = self.tensors[tensor_name]
        return tensor.to(self.dtype) if to_dtype and tensor.is_floating_point() else tensor

    def get_multi_weights_col(self, prefixes: Sequence[str], dim: int) -> Any:
        return self.loader.get_multi_weights_col(self, prefixes, dim)

    def share(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        return tensor.chunk(self.process_group.size(), dim)[self.process_group.rank()]

    @contextmanager
    def use_loader(self, weights_loader: Any) -> Iterator[None]:
        old, self.weights_loader = self.weights_loader, weights_loader
        try:
            yield
        finally:
            self.weights_loader = old


def _blocks_to_block_sizes(total_size: int, blocks: int | list[int]) -> list[int]:
    parts = [1] * blocks if isinstance(blocks, int) else blocks
    return [total_size // sum(parts) * part for part in parts]


def modules(model: Path) -> Mapping[str, ModuleType]:
    """The server's modules that the adapter patches or imports, as far as it needs them; ``model`` is being loaded."""

    def make(name: str, **names: Any) -> ModuleType:
        module = ModuleType(f"text_generation_server.{name}" if name else "text_generation_server")
        vars(module).update(names)
        for value in names.values():
            if isinstance(value, type) and value.__module__ == __name__:
                value.__module__ = module.__name__
        return module

    class GPTQWeightsLoader:
        def __init__(self, *, bits, desc_act, groupsize, quant_method, quantize, sym, modules_to_not_convert):
            self.quant_method, self.quantize = quant_method, quantize

        def get_weights(self, weights, prefix):
            return "stock"

        def get_weights_col_packed(self, weights, prefix, block_sizes):
            return "stock"

        def get_multi_weights_col(self, weights, prefixes, dim):
            return "stock"

        def get_weights_col(self, weights, prefix):
            return weights.loader.get_multi_weights_col(weights, [prefix], 0)

        def get_weights_row(self, weights, prefix):
            return "stock"

        def _get_gptq_params(self, weights):
            pass

    class SparseMoELayer(torch.nn.Module):
        def __init__(self, *, prefix, weights, **kwargs):
            super().__init__()
            self.moe = f"stock, {type(weights.loader).__name__}"

        def forward(self, x, *, gating_output):
            return self.moe(x, gating_output=gating_output)

        @staticmethod
        def is_supported(weights):
            return False

    class HybridFP8UnquantLoader:
        def __init__(self, activation_scale_ub, to_fp8, weight_block_size=None):
            pass

    class CausalLM:
        @classmethod
        def fallback(cls, model_id, revision=None, quantize=None, speculator=None, dtype=None, trust_remote_code=False):
            made = cls()
            made.quantize, made.seen = quantize, (model_id, revision, quantize, dtype, trust_remote_code)
            return made

    def quantize(
        model_id, bits, groupsize, output_dir, revision, trust_remote_code, upload_to_model_id, percdamp, act_order
    ):
        raise AssertionError("the server's own quantizer")

    def load_qkv(config, prefix, weights, num_heads, head_size, hidden_size):
        return weights.get_multi_weights_col([prefix], dim=0).get_linear(None)

    def can_use_gptq_marlin(*, bits, groupsize, quant_method, quantize, sym):
        return True

    def _get_quantizer_config(model_id, revision):
        return "parsed"

    found = [
        make(""),
        make("utils", weight_files=lambda model_id, revision, extension: sorted(model.glob(f"*{extension}"))),
        make(
            "utils.weights",
            DefaultWeightsLoader=DefaultWeightsLoader,
            UnquantizedWeight=UnquantizedWeight,
            _blocks_to_block_sizes=_blocks_to_block_sizes,
        ),
        make(
            "utils.quantization",
            can_use_gptq_marlin=can_use_gptq_marlin,
            _get_quantizer_config=_get_quantizer_config,
        ),
        make("layers"),
        make("layers.fp8", HybridFP8UnquantLoader=HybridFP8UnquantLoader),
        make("layers.gptq", GPTQWeightsLoader=GPTQWeightsLoader),
        make("layers.gptq.quantize", quantize=quantize),
        make("layers.moe", SparseMoELayer=SparseMoELayer),
        make("models"),
        make("models.causal_lm", CausalLM=CausalLM),
        make("models.custom_modeling"),
        make("models.custom_modeling.flash_neox_modeling", load_qkv=load_qkv),
    ]
    return {module.__name__: module for module in found}


@contextmanager
def installed(model: Path) -> Iterator[Mapping[str, ModuleType]]:
    """Have :func:`modules` importable, patched by the adapter, and taken away again."""
    from graftq.adapters.tgi import graftq_seams

    made = modules(model)
    sys.modules.update(made)
    try:
        with undoing():
            for name, patch in (graftq_seams("text_generation_server") or {}).items():
                patch(made[name])
            yield made
    finally:
        for name in made:
            del sys.modules[name]
