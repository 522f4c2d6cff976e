"""An engine's method for linear layers, including fused ones and the output embedding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from graftq.adapters.serving.projection_loader import Cut, ProjectionLoader, inputs, outputs
from graftq.adapters.serving.served_config import ServedConfig
from graftq.plugin.checkpoint.headers import SUFFIXES
from graftq.plugin.manager import choose_kernel
from graftq.quant_linear.errors import CheckpointError
from graftq.quant_linear.gpu.warmup import compile_kernels
from graftq.quant_linear.linear import QuantLinear
from graftq.quant_linear.sharding import join_outputs

SHARDS = {"q": 0, "k": 1, "v": 2}
TENSORS = SUFFIXES[:-1]
"""The tensors that are loaded here; engines load a bias themselves."""

OUTPUT_DIM = {"qweight": 1, "qzeros": 1, "scales": 1}
"""The dimension of the outputs, in the tensors that have one; in ``qzeros`` it is packed."""


@dataclass(frozen=True)
class Partition:
    """One of the projections that an engine has fused into a layer, and the range of its outputs on this rank.

    Attributes:
        full: Number of outputs over all ranks, as in the checkpoint.
        start: This rank's first output.
        stop: One past its last.
    """

    full: int
    start: int
    stop: int


class PackedLinearMethod:
    """What an engine calls for one quantized linear layer; to be mixed into the engine's base class.

    Args:
        config: The checkpoint's configuration.
        prefix: The engine's name of the layer.
        names: The stored names of its projections: one, or one for each part of a fused layer.
    """

    def __init__(self, config: ServedConfig, prefix: str, names: Sequence[str]):
        super().__init__()
        self.config = config
        self.prefix = prefix
        self.names = names
        self.loaders: dict[tuple[int, ...], ProjectionLoader] = {}
        self.partitions: list[Partition] = []
        self.cut_inputs: Cut | None = None
        self.in_features = 0
        self.width = 0
        self.dtype = torch.get_default_dtype()
        self.device = torch.get_default_device()

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register empty parameters whose loaders collect the tensors, whatever their shape."""
        self.in_features, self.dtype = input_size, params_dtype
        self.width = sum(output_partition_sizes)
        places = self.places(layer, output_partition_sizes, output_size)
        self.partitions = partitions_of(layer, output_partition_sizes, places)
        if input_size_per_partition != input_size:
            start = self.rank(layer) * input_size_per_partition
            self.cut_inputs = inputs(start, start + input_size_per_partition)
        for suffix in TENSORS:
            dtype = params_dtype if suffix == "scales" else torch.int32  # vLLM warns of integers loaded into floats
            empty = nn.Parameter(torch.empty(0, dtype=dtype, device=self.device), requires_grad=False)
            empty.weight_loader = partial(self.load, suffix)  # type: ignore[attr-defined]
            if suffix in OUTPUT_DIM:  # Falcon's code reads it to split queries, keys and values
                empty.output_dim = OUTPUT_DIM[suffix]  # type: ignore[attr-defined]
            layer.register_parameter(suffix, empty)

    def rank(self, layer: Any) -> int:
        """This process's number among those that share the layer."""
        raise NotImplementedError

    def places(self, layer: Any, sizes: Sequence[int], output_size: int) -> list[tuple[int, int]]:
        """For each projection, this process's number among those that share its outputs, and how many these are.

        Args:
            layer: The engine's layer.
            sizes: This rank's outputs of each projection.
            output_size: The outputs of all together, over all ranks.
        """
        ranks = output_size // sum(sizes)  # 1 for a layer that is replicated, or cut along its inputs
        return [(self.rank(layer) if ranks > 1 else 0, ranks)] * len(sizes)

    def load(
        self,
        suffix: str,
        param: nn.Parameter,
        loaded_weight: torch.Tensor,
        loaded_shard_id: str | int | tuple[int, ...] | None = None,
    ) -> None:
        """Take one whole tensor of the checkpoint.

        Raises:
            CheckpointError: naming file, module and reason, if it completes a projection that is damaged.
        """
        covered = self._covered(loaded_shard_id)
        if covered not in self.loaders:
            self.loaders[covered] = self._expect(covered)
        try:
            self.loaders[covered].put(suffix, loaded_weight)
        except CheckpointError as error:
            raise self.config.stored.explain(error) from error

    def _covered(self, shard: str | int | tuple[int, ...] | None) -> tuple[int, ...]:
        """Which of the layer's projections a tensor belongs to."""
        if shard is None:
            return tuple(range(len(self.partitions)))
        if isinstance(shard, str):
            if shard not in SHARDS:
                reason = f"graftq does not know {self.config.engine}'s shard {shard!r}"
                raise CheckpointError(reason, module=self.names[0])
            shard = SHARDS[shard]
        return shard if isinstance(shard, tuple) else (shard,)

    def _expect(self, covered: tuple[int, ...]) -> ProjectionLoader:
        module = self._name(covered)
        own = [self.partitions[index] for index in covered]
        ranges, offset = [], 0
        for partition in own:
            ranges.append((offset + partition.start, offset + partition.stop))
            offset += partition.full
        cut = self.cut_inputs or outputs(*ranges)
        declared = self.config.gptq.for_module(module)
        return ProjectionLoader(module, declared, self.in_features, offset, cut, self.device, self.dtype)

    def _name(self, covered: tuple[int, ...]) -> str:
        if len(self.names) == len(self.partitions) and len(covered) == 1:
            return self.names[covered[0]]
        return self.names[0] if len(self.names) == 1 else self.prefix

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that every tensor has arrived, and build packed layers from them.

        Raises:
            CheckpointError: naming file, module and reason, if anything is missing or damaged.
        """
        if hasattr(layer, "graftq"):
            return
        self.config.stored.check()
        try:
            shards = join_outputs([shard for loader in self._all() for shard in loader.shards()])
            self._check_biases(layer)
        except CheckpointError as error:
            raise self.config.stored.explain(error) from error
        self.loaders = {}
        layers = [QuantLinear.from_tensors(spec, tensors, choose_kernel, self.dtype) for tensors, spec in shards]
        for packed in layers:
            packed.bind(self.device.type, self.dtype)
            compile_kernels(packed, partial(self._call, packed), self.config.most_tokens)
        for suffix in TENSORS[1:]:  # LoRA asks `qweight` for the device
            delattr(layer, suffix)
        layer.graftq = nn.ModuleList(layers)
        self.config.remember(f"{self.prefix}: {layers}")

    def _call(self, packed: QuantLinear, tokens: int) -> torch.Tensor:
        return packed(torch.empty(tokens, packed.in_features, dtype=self.dtype, device=self.device))

    def _all(self) -> list[ProjectionLoader]:
        """The loaders in the order of their outputs; each projection must have arrived exactly once."""
        found = sorted(self.loaders)
        covered = [index for indices in found for index in indices]
        for index in range(len(self.partitions)):
            if covered.count(index) != 1:
                number = "two tensors" if index in covered else "no tensor in the checkpoint"
                raise CheckpointError(f"{number} for this projection", module=self._name((index,)))
        return [self.loaders[indices] for indices in found]

    def _check_biases(self, layer: Any) -> None:
        if getattr(layer, "bias", None) is not None:
            return
        for loader in self.loaders.values():
            bias = self.config.stored.idle_bias(loader.module)
            if bias is not None:
                loader.refuse_bias(bias)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """``x`` [..., K] in the layer's dtype; [..., N], zeros where the vocabulary is padded."""
        found = [packed(x) for packed in layer.graftq]
        if not found:  # this rank has only padding
            return x.new_zeros(*x.shape[:-1], self.width)
        out = found[0] if len(found) == 1 else torch.cat(found, dim=-1)
        if out.shape[-1] < self.width:
            out = nn.functional.pad(out, (0, self.width - out.shape[-1]))
        return out if bias is None else out + bias


def partitions_of(layer: Any, sizes: Sequence[int], places: Sequence[tuple[int, int]]) -> list[Partition]:
    """Which outputs of each fused projection this rank computes.

    Args:
        layer: A linear layer or output embedding.
        sizes: This rank's outputs of each projection.
        places: As :meth:`PackedLinearMethod.places` gives them.
    """
    vocabulary = getattr(layer, "shard_indices", None)
    if vocabulary is not None:
        start, stop = vocabulary.org_vocab_start_index, vocabulary.org_vocab_end_index
        return [Partition(layer.org_vocab_size, start, stop)]
    # Where there are more ranks than key and value heads, several ranks share a head.
    replicas = [1] + [getattr(layer, "num_kv_head_replicas", 1)] * (len(sizes) - 1)
    found = []
    for size, shared, (rank, ranks) in zip(sizes, replicas, places, strict=True):
        own = rank // shared
        found.append(Partition(size * ranks // shared, own * size, (own + 1) * size))
    return found
