"""The tensors of one projection, from the first that is handed over to the part of it that this rank keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from graftq.plugin.checkpoint.headers import SUFFIXES, info_of
from graftq.plugin.checkpoint.padding import is_padded
from graftq.plugin.checkpoint.validation import Declared, spec_from_headers
from graftq.plugin.checkpoint.values import check_values
from graftq.quant_linear.errors import CheckpointError
from graftq.quant_linear.layouts import GptqTensors
from graftq.quant_linear.sharding import Shard, shard_inputs, shard_outputs
from graftq.quant_linear.spec import QuantSpec

Cut = Callable[[GptqTensors, QuantSpec], list[Shard]]
"""From a whole projection to what this rank keeps of it."""


class ProjectionLoader:
    """One projection of the checkpoint, collected tensor by tensor.

    Args:
        module: Its stored name, for messages.
        declared: What the configuration says of it.
        in_features: K of the whole projection, as the model has it.
        out_features: N of the whole projection, as the model has it.
        cut: Takes this rank's part as soon as all tensors are there, so that no rank ever holds a whole model.
        device: Where the layer computes.
        dtype: What it computes in.
        has_bias: Whether the projection brings a bias of its own.
    """

    def __init__(
        self,
        module: str,
        declared: Declared,
        in_features: int,
        out_features: int,
        cut: Cut,
        device: torch.device,
        dtype: torch.dtype,
        has_bias: bool = False,
    ):
        self.module = module
        self.declared = declared
        self.in_features = in_features
        self.out_features = out_features
        self.device = device
        self.dtype = dtype
        self.has_bias = has_bias
        self._cut = cut
        self._tensors: dict[str, torch.Tensor] = {}
        self._shards: list[Shard] | None = None
        wanted = SUFFIXES if has_bias else SUFFIXES[:-1]
        self._missing = set(wanted)

    def put(self, suffix: str, tensor: torch.Tensor) -> None:
        """Take one tensor.

        Raises:
            CheckpointError: if it is there already, or, with the last one, if the projection is damaged.
        """
        name = f"{self.module}.{suffix}"
        if suffix == "bias" and not self.has_bias:
            self.refuse_bias(tensor)
            return
        if suffix not in self._missing:
            raise CheckpointError("two tensors for one place in the layer", module=name)
        self._missing.discard(suffix)
        # A copy in any case: some readers of vLLM's reuse the memory. What is small is checked where it arrives, as
        # each look at a value on a GPU waits for all that the GPU has been given to do.
        place = self.device if suffix == "qweight" else tensor.device
        self._tensors[suffix] = tensor.detach().to(place, copy=True)
        if not self._missing:
            self.shards()

    def refuse_bias(self, bias: torch.Tensor) -> None:
        """AutoGPTQ stores a bias of zeros for every layer; any other, an engine would drop without a word.

        Raises:
            CheckpointError: if there is anything but zeros in it.
        """
        if bias.any():
            raise CheckpointError("non-zero bias, but the model's layer has none", module=f"{self.module}.bias")

    @property
    def is_complete(self) -> bool:
        """Whether all tensors have been handed over."""
        return not self._missing

    def keep(self, shard: Shard) -> None:
        """Keep this part of what :meth:`shards` has given, and no more."""
        self._shards = [shard]

    def shards(self) -> list[Shard]:
        """What this rank keeps; to be asked when all of the checkpoint has been handed over.

        Raises:
            CheckpointError: naming the module and the reason, if a tensor is missing or wrong.
        """
        if self._shards is None:
            tensors, spec = self._check()
            self._tensors = {}
            self._shards = self._cut(tensors, spec)
        return self._shards

    def _check(self) -> Shard:
        if not self._tensors:
            raise CheckpointError("no tensor in the checkpoint for this projection", module=self.module)
        infos = {suffix: info_of(f"{self.module}.{suffix}", tensor) for suffix, tensor in self._tensors.items()}
        spec = spec_from_headers(
            self.module, infos, self.declared, self.in_features, self.out_features, has_bias=self.has_bias
        )
        moved = {suffix: tensor.to(self.device) for suffix, tensor in self._tensors.items()}
        # Padding is judged by weights, for which all tensors have to be in one place.
        values = moved if is_padded(spec) else self._tensors
        spec = check_values(self.module, infos, spec, self.declared, values, self.dtype)
        tensors = GptqTensors(**moved)
        return (tensors, spec) if spec.desc_act else (replace(tensors, g_idx=None), replace(spec, stored_g_idx=0))


def uncut(tensors: GptqTensors, spec: QuantSpec) -> list[Shard]:
    """Keep all."""
    return [(tensors, spec)]


def outputs(*ranges: tuple[int, int]) -> Cut:
    """Keep these ranges of output rows, apart from each other unless they meet."""
    merged: list[tuple[int, int]] = []
    for start, stop in ranges:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        elif start < stop:
            merged.append((start, stop))

    def cut(tensors: GptqTensors, spec: QuantSpec) -> list[Shard]:
        if merged == [(0, spec.padded_out)]:
            return [(tensors, spec)]
        return [shard_outputs(tensors, spec, start, stop) for start, stop in merged]

    return cut


def inputs(start: int, stop: int, keep_bias: bool = False) -> Cut:
    """Keep this range of input rows; the whole range keeps all."""

    def cut(tensors: GptqTensors, spec: QuantSpec) -> list[Shard]:
        if (start, stop) == (0, spec.in_features):
            return [(tensors, spec)]
        return [shard_inputs(tensors, spec, start, stop, keep_bias)]

    return cut
