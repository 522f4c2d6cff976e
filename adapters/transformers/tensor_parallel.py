"""Tensor parallelism: each rank keeps its part of every packed layer that the model's ``tp_plan`` shards.

transformers shards each parameter by itself, while loading it; the tensors of a packed layer can only be cut
together (act-order, words that hold several codes). So every rank loads packed layers whole and cuts them afterwards,
which temporarily takes the memory of the whole packed model. transformers shards everything else as usual.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from graftq.quant_linear.experts import QuantExpert, QuantExperts
from graftq.quant_linear.experts_spec import PROJECTIONS
from graftq.quant_linear.linear import QuantLinear
from graftq.quant_linear.sharding import Shard, select_outputs, shard_inputs, shard_outputs, share_inputs

COLUMN_STYLES = ("colwise", "colwise_gather_output", "colwise_rep")
GATHERING = ("colwise_gather_output", "colwise_rep")
ROW_STYLES = ("rowwise", "rowwise_split_input", "rowwise_rep")
SPLITTING = ("rowwise_split_input", "rowwise_rep")
EXPERTS_STYLE = "moe_tp_experts"
WHOLE = "replicate"
"""The style of what every rank keeps; transformers has it from 5.21 on."""

WHOLE_PARAMETER = (WHOLE, "replicated_with_grad_allreduce")
"""Styles that leave a parameter as it is, the first known counts; the second does more, but to modules alone."""


@dataclass(frozen=True)
class TensorSlice:
    """One of the ranks that share a layer."""

    rank: int
    size: int
    group: Any

    def of(self, width: int) -> tuple[int, int]:
        """This rank's range of ``width``, as ``torch.chunk`` cuts it."""
        step = -(-width // self.size)
        return min(self.rank * step, width), min((self.rank + 1) * step, width)


def keep_whole(model: Any) -> None:
    """Tell transformers, by the model's plan, not to shard packed tensors while it loads them."""
    plan = getattr(model, "tp_plan", None)
    if plan:
        _keep_whole(model, plan)


def keep_whole_in_stated(original: Any) -> Any:
    """``maybe_distribute_model``, a class method, so that packed tensors are not sharded by a caller's plan either.

    For versions that put that plan in the place of the model's, after :func:`keep_whole` and before they shard.
    """
    function: Callable[..., Any] = original.__func__

    @functools.wraps(function)
    def maybe_distribute_model(cls: type, model: Any, distributed_config: Any, *args: Any, **kwargs: Any) -> Any:
        stated = getattr(distributed_config, "tp_plan", None)
        if not isinstance(stated, dict) or next(_packed(model), None) is None:
            return function(cls, model, distributed_config, *args, **kwargs)
        own = copy.copy(distributed_config)  # the caller may distribute other models by his
        own.tp_plan = dict(stated)
        _keep_whole(model, own.tp_plan)
        model = function(cls, model, own, *args, **kwargs)
        model.config.distributed_config = distributed_config
        return model

    return classmethod(maybe_distribute_model)


def _keep_whole(model: Any, plan: dict[str, str]) -> None:
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

    whole = next(style for style in WHOLE_PARAMETER if style in ALL_PARALLEL_STYLES)  # 5.17 and later refuse others
    for name, module in _packed(model):
        for own, _ in module.named_parameters(recurse=False):
            plan[f"{_generic(name)}.{own}"] = whole
    names = {_generic(name) for name, _ in (*model.named_modules(), *model.named_parameters())}
    stacked = {f"{_generic(name)}.{own}" for name, module in _packed(model) for own in _stacked(module)}
    for name in stacked - names:
        plan.pop(name, None)  # no experts module has this weight now


def shard(model: Any) -> bool:
    """Reduce each packed layer that the plan shards to this rank's part, before kernels are chosen.

    Returns:
        Whether the model is distributed, and thus not whole in this process.

    Raises:
        ValueError: naming the layer and why it cannot be cut.
    """
    config = getattr(model.config, "distributed_config", None)
    mesh = getattr(model, "_device_mesh", None)
    if config is None or mesh is None:
        return False
    for name, module in _packed(model):
        if any(hasattr(parameter, "placements") for parameter in module.parameters()):
            raise ValueError(f"{name} is packed, and only tensor parallelism by the model's own plan can distribute it")
    for kind in ("ep_size", "fsdp_size", "pp_size"):
        if (getattr(config, kind, 1) or 1) > 1:
            raise ValueError(f"{kind}={getattr(config, kind)}: of packed models, only tensor parallelism is supported")
    if (config.tp_size or 1) > 1:
        mesh = mesh["tp"] if mesh.ndim > 1 else mesh
        part = TensorSlice(mesh.get_local_rank(), mesh.size(), mesh.get_group())
        for name, module in list(_packed(model)):
            style = model.tp_plan.get(_generic(name))
            if style is not None:
                model.set_submodule(name, _cut(name, module, style, part))
    return True


def _packed(model: nn.Module) -> Iterator[tuple[str, QuantLinear | QuantExperts]]:
    """Packed linear layers, and experts as a whole."""
    for name, child in model.named_children():
        if isinstance(child, (QuantLinear, QuantExperts)):
            yield name, child
        else:
            yield from ((f"{name}.{below}", module) for below, module in _packed(child))


def _generic(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _stacked(module: QuantLinear | QuantExperts) -> tuple[str, ...]:
    return ("gate_up_proj", "up_proj", "down_proj") if isinstance(module, QuantExperts) else ()


def _cut(name: str, module: QuantLinear | QuantExperts, style: str, part: TensorSlice) -> nn.Module:
    try:
        if isinstance(module, QuantExperts) and style == EXPERTS_STYLE:
            return _cut_experts(module, part)
        if isinstance(module, QuantLinear) and style in COLUMN_STYLES:
            return _cut_outputs(module, style in GATHERING, part)
        if isinstance(module, QuantLinear) and style in ROW_STYLES:
            return _cut_inputs(module, style in SPLITTING, part)
    except ValueError as error:
        raise ValueError(f"{name} cannot be cut for {part.size} ranks: {error}") from error
    if isinstance(module, QuantLinear) and style == WHOLE:
        return module
    known = (*COLUMN_STYLES, *ROW_STYLES, EXPERTS_STYLE)
    raise ValueError(f"{name} is packed, and cannot be sharded by {style!r}; only by {', '.join(known)}")


def _cut_outputs(layer: QuantLinear, gather: bool, part: TensorSlice) -> QuantLinear:
    if gather and layer.out_features % part.size:
        raise ValueError(f"{layer.out_features} outputs are to be gathered from parts of equal size")
    shard = shard_outputs(layer.release(), layer.spec, *part.of(layer.out_features))
    cut = _layer(shard, layer)
    cut.register_forward_pre_hook(lambda _, args: (_shared(args[0], part.group), *args[1:]))
    if gather:
        cut.register_forward_hook(lambda _, args, output: _Gathered.apply(output, part.group, part.rank, part.size))
    return cut


def _cut_inputs(layer: QuantLinear, split: bool, part: TensorSlice) -> QuantLinear:
    start, stop = part.of(layer.in_features)
    tensors = layer.release()
    cut = _layer(shard_inputs(tensors, layer.spec, start, stop, keep_bias=part.rank == 0), layer)
    if split:
        cut.register_forward_pre_hook(
            lambda _, args: (_shared(args[0], part.group)[..., start:stop], *args[1:]),
        )
    cut.register_forward_hook(lambda _, args, output: _summed(output, part.group))
    return cut


def _layer(shard: Shard, like: QuantLinear) -> QuantLinear:
    tensors, spec = shard
    layer = QuantLinear.from_tensors(spec, tensors, like.choose, like.dtype)
    layer.keeps_dtype = like.keeps_dtype
    return layer


def _cut_experts(experts: QuantExperts, part: TensorSlice) -> QuantExperts:
    """Every expert stays on every rank, with a part of its intermediate features."""
    if experts.post_expert_norm is not None:
        raise ValueError("its experts' outputs are normalized, which wants them whole")
    width = experts.spec.of("down_proj")[0].in_features
    start, stop = part.of(width)
    up_name, down_name = experts.bias_names
    up_bias, down_bias = experts.up_bias, None if part.rank else experts.down_bias
    shares, features = [], []
    for number in range(experts.num_experts):
        share, own = _cut_expert(experts, number, start, stop, part.rank == 0)
        shares.append(share)
        features.append(own)
    if up_bias is not None:
        rows = torch.stack([_up_rows(experts, own, width) for own in features]).to(up_bias.device)
        up_bias = up_bias.gather(1, rows)
    cut = QuantExperts(
        shares,
        experts.choose,
        experts.activate,
        is_concatenated=experts.spec.is_concatenated,
        up_bias=_named(up_name, up_bias),
        down_bias=_named(down_name, down_bias),
    )
    cut.register_forward_pre_hook(lambda _, args: (_shared(args[0], part.group), args[1], _shared(args[2], part.group)))
    cut.register_forward_hook(lambda _, args, output: _summed(output, part.group))
    return cut


def _named(name: str | None, bias: torch.Tensor | None) -> tuple[str, nn.Parameter] | None:
    """A bias as :class:`QuantExperts` takes it."""
    return None if name is None or bias is None else (name, nn.Parameter(bias))


def _cut_expert(
    experts: QuantExperts, number: int, start: int, stop: int, is_first: bool
) -> tuple[QuantExpert, torch.Tensor]:
    """A rank's share of an expert, and the inner features that it has: whole groups of ``down_proj`` where possible."""
    expert: Any = experts.get_submodule(str(number))
    layers = dict(expert.named_children())
    down = layers.pop("down_proj")
    last, features = share_inputs(down.release(), down.spec, start, stop, keep_bias=is_first)
    cut = {"down_proj": _layer(last, down)}
    for name, layer in layers.items():
        tensors, spec = layer.release(), layer.spec
        if name == "gate_up_proj" and experts.spec.is_concatenated:
            half = spec.out_features // 2
            shares = {"gate_proj": features, "up_proj": half + features}
        else:
            shares = {name: _interleaved(features) if name == "gate_up_proj" else features}
        cut |= {own: _layer(select_outputs(tensors, spec, rows), layer) for own, rows in shares.items()}
    return QuantExpert({name: cut[name] for name in PROJECTIONS if name in cut}), features


def _up_rows(experts: QuantExperts, features: torch.Tensor, width: int) -> torch.Tensor:
    """The columns of the layer's own bias of gate and up that belong to some of ``width`` inner features."""
    if not experts.spec.is_gated:
        return features
    return torch.cat((features, width + features)) if experts.spec.is_concatenated else _interleaved(features)


def _interleaved(features: torch.Tensor) -> torch.Tensor:
    """Where gate and up of these features are, if they alternate."""
    return torch.stack((2 * features, 2 * features + 1), dim=1).flatten()


def _shared(x: torch.Tensor, group: Any) -> torch.Tensor:
    """An input of all ranks, with a gradient if one is wanted: the function costs the host as much as a launch."""
    return _Shared.apply(x, group) if torch.is_grad_enabled() else x


def _summed(x: torch.Tensor, group: Any) -> torch.Tensor:
    """The sum of the ranks' parts of an output; without gradients, in the memory of this rank's part."""
    if torch.is_grad_enabled():
        return _Summed.apply(x, group)
    dist.all_reduce(x, group=group)
    return x


class _Shared(torch.autograd.Function):
    """An input that all ranks have; the sum of the ranks' gradients is its gradient."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _Summed(torch.autograd.Function):
    """Sums the ranks' parts of an output; every rank gets the sum."""

    @staticmethod
    def forward(ctx, x, group):
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _Gathered(torch.autograd.Function):
    """Concatenates the ranks' parts of an output; every rank gets all of it."""

    @staticmethod
    def forward(ctx, x, group, rank, size):
        ctx.range = (rank * x.shape[-1], (rank + 1) * x.shape[-1])
        parts = [torch.empty_like(x) for _ in range(size)]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx, grad):
        start, stop = ctx.range
        return grad[..., start:stop], None, None, None
