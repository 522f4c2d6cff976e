"""``model.dequantize()``: turns a packed model into a plain float model with the dequantized weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from graftq.adapters.transformers.saving import Origin
from graftq.quant_linear.experts import QuantExperts
from graftq.quant_linear.linear import QuantLinear
from graftq.quant_linear.packing import dequantize


@torch.no_grad()
def dequantize_model(model: Any, origin: Origin, dtype: torch.dtype | None) -> Any:
    """Put the plain modules back, with dequantized weights that are rounded once, to ``dtype``.

    Adapters around packed layers stay where they are, around the plain ones.

    Args:
        model: What was loaded, or the model inside that.
        origin: What is remembered of its checkpoint; its plain modules move into the model.
        dtype: None for the model's own.

    Raises:
        ValueError: if weights are offloaded, or a packed layer is not where it was loaded.
    """
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, (QuantLinear, QuantExperts)) and _plain_name(name) in origin.plain
    ]
    _check_complete(model, found)
    old = _as_dtype(model.config.dtype)
    dtype = old if dtype is None else _as_dtype(dtype)
    for name, module in found:
        plain = origin.plain.pop(_plain_name(name))
        own = module.dtype if module.keeps_dtype else dtype
        if isinstance(module, QuantLinear):
            _fill_linear(plain, module, own)
        else:
            _fill_experts(plain, module, own)
        _take_over(plain, module)
        model.set_submodule(name, plain)
    if dtype != old:
        _cast(model, old, dtype)
    _forget(model)
    return model


def _plain_name(name: str) -> str:
    return name.replace(".base_layer", "")  # PEFT's name for the layer that an adapter wraps


def _check_complete(model: nn.Module, found: list[tuple[str, Any]]) -> None:
    known = {id(module) for _, module in found}
    for _, experts in found:
        known |= {id(layer) for expert in experts.children() for layer in expert.children()}
    for name, module in model.named_modules():
        if not isinstance(module, (QuantLinear, QuantExperts)):
            continue
        if id(module) not in known:
            raise ValueError(f"{name} is not where it was loaded, so nothing says what it was before")
        if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
            raise ValueError(f"{name} is offloaded; load the model without offloading to dequantize it")


def _fill_linear(plain: nn.Module, packed: QuantLinear, dtype: torch.dtype) -> None:
    tensors = packed.checkpoint_tensors()
    weight = dequantize(tensors, packed.spec).to(dtype)
    plain.weight = nn.Parameter((weight.T if isinstance(plain, Conv1D) else weight).contiguous())
    if tensors.bias is not None:
        plain.bias = nn.Parameter(tensors.bias[: packed.spec.out_features].to(dtype, copy=True))


def _fill_experts(plain: Any, packed: QuantExperts, dtype: torch.dtype) -> None:
    """Stack the experts' weights as transformers' experts modules store them."""
    up_name = next(name for name in ("gate_up_proj", "up_proj") if name == "up_proj" or packed.spec.is_gated)
    weights: dict[str, torch.Tensor] = {}
    for expert in range(packed.num_experts):
        for name, rows in _expert_rows(packed, expert, up_name).items():
            for own, row in rows.items():
                value = row.T if own == "weight" and plain.is_transposed else row
                key = name if own == "weight" else f"{name}_bias"
                if key not in weights:
                    weights[key] = torch.empty((packed.num_experts, *value.shape), dtype=dtype, device=value.device)
                weights[key][expert] = value
    for bias_name, bias in zip((f"{up_name}_bias", "down_proj_bias"), (packed.up_bias, packed.down_bias), strict=True):
        if bias is not None:
            weights[bias_name] = bias.to(dtype)
    for name, weight in weights.items():
        plain.register_parameter(name, nn.Parameter(weight))


def _expert_rows(packed: QuantExperts, expert: int, up_name: str) -> dict[str, dict[str, torch.Tensor]]:
    """Weights [N, K] and biases [N] of one expert, by projection of the plain module."""
    rows: dict[str, dict[str, torch.Tensor]] = {}
    for name, specs in packed.spec.projections:
        tensors = packed.checkpoint_tensors(name, expert)
        rows[name] = {"weight": dequantize(tensors, specs[expert])}
        if tensors.bias is not None:
            rows[name]["bias"] = tensors.bias[: specs[expert].out_features].to(torch.float32)
    if "gate_proj" in rows:
        gate, up = rows.pop("gate_proj"), rows.pop("up_proj")
        join = _concatenate if packed.spec.is_concatenated else _interleave
        rows[up_name] = {own: join(gate[own], up[own]) for own in gate}
    return rows


def _concatenate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.cat((gate, up))


def _interleave(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.stack((gate, up), dim=1).flatten(0, 1)


def _take_over(plain: nn.Module, packed: nn.Module) -> None:
    """Copy the mode, and the hook by which accelerate moves inputs to this module's device."""
    plain.training = packed.training
    hook = getattr(packed, "_hf_hook", None)
    if hook is not None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(plain, hook)


def _as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype  # saving leaves the name in the configuration


def _cast(model: Any, old: torch.dtype, new: torch.dtype) -> None:
    """Cast what has the model's dtype to the new one; what the model keeps in another dtype stays."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype == old:
            tensor.data = tensor.data.to(new)
    model.config.dtype = new


def _forget(model: Any) -> None:
    """Remove what makes transformers treat the model, and the models inside it, as quantized."""
    from transformers.modeling_utils import PreTrainedModel

    head = model.get_output_embeddings()
    if head is not None and getattr(head, "weight", None) is not getattr(model.get_input_embeddings(), "weight", None):
        for config in (model.config, model.config.get_text_config(decoder=True)):
            config.tie_word_embeddings = False
    parts: list[tuple[str, Any]] = [(n, m) for n, m in model.named_modules() if isinstance(m, PreTrainedModel)]
    for name, part in parts:
        part._weight_conversions = None  # an ordinary checkpoint from here on, with the names transformers gives
        part.config._is_quantized = False
        if name and hasattr(part, "hf_quantizer"):
            del part.hf_quantizer
