"""The server's weights loader for GPTQ: reads whole projections and cuts them for this rank; they stay packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import nn

from graftq.adapters.tgi.model_files import Checkpoint, asked_for, is_gptq
from graftq.plugin.checkpoint.validation import spec_from_headers
from graftq.plugin.checkpoint.values import check_values
from graftq.plugin.manager import choose_kernel
from graftq.quant_linear.errors import CheckpointError
from graftq.quant_linear.gpu.warmup import MOST_TOKENS, compile_kernels
from graftq.quant_linear.layouts import GptqTensors
from graftq.quant_linear.linear import QuantLinear
from graftq.quant_linear.sharding import Shard, join_outputs, shard_inputs, shard_outputs
from graftq.quant_linear.spec import QuantSpec

Range = tuple[int, int]


@dataclass(frozen=True)
class ServerProjection:
    """One projection as stored, on the CPU; ``lost_bias`` names a non-zero bias in the files, if there is one."""

    tensors: GptqTensors
    spec: QuantSpec
    lost_bias: str | None


class PackedLoader:
    """A mixin in front of ``GPTQWeightsLoader``; for anything but GPTQ, every method calls the stock one.

    The files show what is quantized, layer by layer, so ``modules_to_not_convert`` and ``dynamic`` need not be read.

    Attributes:
        checkpoint: What is being loaded; None if the stock loader loads it.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.checkpoint: Checkpoint | None = None
        self._ready: set[tuple[QuantSpec, torch.dtype]] = set()
        if is_gptq(kwargs["quantize"], kwargs["quant_method"]):
            from text_generation_server.utils import weight_files

            model_id, revision = asked_for.get()
            files = weight_files(model_id, revision=revision, extension=".safetensors")
            self.checkpoint = Checkpoint.open(model_id, revision, sorted(map(str, files)))

    def get_weights(self, weights: Any, prefix: str) -> Any:
        """The whole projection."""
        if self.checkpoint is None:
            return super().get_weights(weights, prefix)  # type: ignore[misc]
        if not self.is_packed(weights, prefix):
            return _plain().get_weights(weights, prefix)
        one = self.read(weights, prefix)
        return self._weight(weights, [(one.tensors, one.spec)], one.lost_bias)

    def get_weights_col_packed(self, weights: Any, prefix: str, block_sizes: int | list[int]) -> Any:
        """This rank's share of each block of outputs of a projection that holds several."""
        if self.checkpoint is None:
            return super().get_weights_col_packed(weights, prefix, block_sizes)  # type: ignore[misc]
        if not self.is_packed(weights, prefix):
            return _plain().get_weights_col_packed(weights, prefix, block_sizes)
        from text_generation_server.utils.weights import _blocks_to_block_sizes

        one = self.read(weights, prefix)
        ranges, offset = [], 0
        for size in _blocks_to_block_sizes(total_size=one.spec.out_features, blocks=block_sizes):
            start, stop = share(prefix, size, weights.process_group)
            ranges.append((offset + start, offset + stop))
            offset += size
        return self._weight(weights, columns(one, ranges), one.lost_bias)

    def get_multi_weights_col(self, weights: Any, prefixes: Sequence[str], dim: int) -> Any:
        """This rank's share of the outputs of several projections, side by side."""
        if self.checkpoint is None:
            return super().get_multi_weights_col(weights, prefixes, dim)  # type: ignore[misc]
        if not any(self.is_packed(weights, prefix) for prefix in prefixes):
            return _plain().get_multi_weights_col(weights, prefixes, dim)
        parts: list[Shard | Any] = []
        lost = None
        for prefix in prefixes:
            if not self.is_packed(weights, prefix):
                parts.append(_plain().get_multi_weights_col(weights, [prefix], dim))
                continue
            one = self.read(weights, prefix)
            lost = lost or one.lost_bias
            parts += columns(one, [share(prefix, one.spec.out_features, weights.process_group)])
        return self._weight(weights, parts, lost)

    def get_weights_row(self, weights: Any, prefix: str) -> Any:
        """This rank's share of the inputs; the ranks add their products up."""
        if self.checkpoint is None:
            return super().get_weights_row(weights, prefix)  # type: ignore[misc]
        if not self.is_packed(weights, prefix):
            return _plain().get_weights_row(weights, prefix)
        one = self.read(weights, prefix)
        lost = one.lost_bias if weights.process_group.rank() == 0 else None  # the first rank alone adds the bias
        return self._weight(weights, [self.rows(weights, prefix, one)], lost)

    def rows(self, weights: Any, prefix: str, one: ServerProjection) -> Shard:
        """This rank's share of the inputs, on the CPU."""
        start, stop = share(prefix, one.spec.in_features, weights.process_group)
        if stop - start == one.spec.in_features:
            return one.tensors, one.spec
        return shard_inputs(one.tensors, one.spec, start, stop, keep_bias=False)

    def _get_gptq_params(self, weights: Any) -> None:
        """Called only by the first Santacoder's loading code, which assumes 4 bits and checkpoint format v1.

        Raises:
            CheckpointError: for any other.
        """
        super()._get_gptq_params(weights)  # type: ignore[misc]
        if self.checkpoint is not None:
            declared = self.checkpoint.require_config(weights).declared
            if declared.bits not in (None, 4) or declared.zero_offset != 1:
                reason = "the server reads this model's c_attn as 4 bits and gptq (v1), and the configuration differs"
                raise CheckpointError(reason, file=self.checkpoint.file)

    def is_packed(self, weights: Any, prefix: str) -> bool:
        """Whether the files have this projection quantized.

        Raises:
            CheckpointError: if they have no tensor for it.
        """
        if any(weights.has_tensor(f"{prefix}.{suffix}") for suffix in ("qweight", "qzeros")):
            return True
        if weights.has_tensor(f"{prefix}.weight"):
            return False
        assert self.checkpoint is not None
        raise CheckpointError(
            "no tensor in the checkpoint for this weight", file=self.checkpoint.file, module=f"{prefix}.weight"
        )

    def read(self, weights: Any, prefix: str) -> ServerProjection:
        """A projection from the files, checked.

        Raises:
            CheckpointError: naming file, module and reason.
        """
        assert self.checkpoint is not None
        present = "qweight" if weights.has_tensor(f"{prefix}.qweight") else "qzeros"
        stored = weights.get_filename(f"{prefix}.{present}")[1].removesuffix(f".{present}")
        infos = self.checkpoint.projections[stored]
        declared = self.checkpoint.require_config(weights).for_module(stored)
        spec = spec_from_headers(stored, infos, declared)
        values = {suffix: weights.get_tensor(f"{prefix}.{suffix}", to_device=False, to_dtype=False) for suffix in infos}
        bias = values.pop("bias", None)
        spec = check_values(stored, infos, spec, declared, values, weights.dtype)
        lost = f"{stored}.bias" if bias is not None and bias.any() else None
        return ServerProjection(GptqTensors(**values), spec, lost)

    def _weight(self, weights: Any, parts: Sequence[Shard | Any], lost_bias: str | None) -> PackedWeight:
        return PackedWeight(self, parts, weights.device, weights.dtype, lost_bias)

    def refuse_lost_bias(self, name: str | None) -> None:
        """Raise for a bias that the model's code does not load."""
        if name is not None:
            assert self.checkpoint is not None
            reason = "non-zero bias, but the model's layer has none"
            raise CheckpointError(reason, file=self.checkpoint.index.tensors[name].file, module=name)

    def make_linear(self, shard: Shard, device: torch.device, dtype: torch.dtype) -> QuantLinear:
        """A layer on ``device``, ready to run: repacked for its kernel, which has compiled and has its workspace."""
        layer = unbound_linear(shard, device, dtype)
        layer.bind(device.type, dtype)
        if device.type != "cpu" and (layer.spec, dtype) not in self._ready:
            self._ready.add((layer.spec, dtype))
            inputs = partial(torch.zeros, device=device, dtype=dtype)
            layer(inputs((1, layer.in_features)))
            compile_kernels(layer, lambda tokens: layer(inputs((tokens, layer.in_features))), MOST_TOKENS)
        return layer


@dataclass
class PackedWeight:
    """What the loader returns to the server's layers: projections side by side, packed or plain."""

    loader: PackedLoader
    parts: Sequence[Shard | Any]
    device: torch.device
    dtype: torch.dtype
    lost_bias: str | None

    def get_linear(self, bias: torch.Tensor | None) -> nn.Module:
        """The layer that computes all of them.

        Raises:
            CheckpointError: if the files have a bias and the model's layer has none.
        """
        if bias is None:
            self.loader.refuse_lost_bias(self.lost_bias)
        parts: list[Shard | Any] = []
        for is_packed, group in groupby(self.parts, lambda part: isinstance(part, tuple)):
            run = list(group)
            parts += join_outputs(run) if is_packed else run
        widths = [part[1].out_features if isinstance(part, tuple) else part.weight.shape[0] for part in parts]
        biases = [None] * len(parts) if bias is None else bias.split(widths)
        layers = [
            self.loader.make_linear(_with_bias(part, own), self.device, self.dtype)
            if isinstance(part, tuple)
            else part.get_linear(own)
            for part, own in zip(parts, biases, strict=True)
        ]
        return layers[0] if len(layers) == 1 else SideBySide(layers)


class SideBySide(nn.Module):
    """Concatenates the outputs of layers with the same input, for projections that differ in their act-order."""

    def __init__(self, layers: Sequence[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """From [..., inputs] to [..., all outputs]."""
        return torch.cat([layer(x) for layer in self.layers], dim=-1)


def share(name: str, size: int, process_group: Any) -> Range:
    """This rank's range of ``size`` inputs or outputs.

    Raises:
        ValueError: if it cannot be divided evenly.
    """
    ranks = process_group.size()
    if size % ranks:
        raise ValueError(f"{name}: {size} cannot be divided among {ranks} shards")
    return process_group.rank() * size // ranks, (process_group.rank() + 1) * size // ranks


def columns(one: ServerProjection, ranges: Sequence[Range]) -> list[Shard]:
    """The given ranges of a projection's outputs; no copy is made if they cover all of them."""
    edges = [edge for start_stop in ranges for edge in start_stop]
    if edges[0] == 0 and edges[-1] == one.spec.out_features and edges[1:-1:2] == edges[2:-1:2]:
        return [(one.tensors, one.spec)]
    return [shard_outputs(one.tensors, one.spec, start, stop) for start, stop in ranges]


def unbound_linear(shard: Shard, device: torch.device, dtype: torch.dtype) -> QuantLinear:
    """A layer on ``device`` with the tensors as stored, for which no kernel has been chosen."""
    tensors, spec = shard
    moved = {name: tensor.to(device) for name, tensor in vars(tensors).items() if tensor is not None}
    return QuantLinear.from_tensors(spec, GptqTensors(**moved), choose_kernel, dtype)


def _with_bias(shard: Shard, bias: torch.Tensor | None) -> Shard:
    tensors, spec = shard
    if bias is None:
        return shard
    return replace(tensors, bias=bias.contiguous()), replace(spec, stored_bias=bias.shape[0])


def _plain() -> Any:
    from text_generation_server.utils.weights import DefaultWeightsLoader, UnquantizedWeight

    return DefaultWeightsLoader(UnquantizedWeight)
