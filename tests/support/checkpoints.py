"""Tiny GPTQ checkpoints of any architecture, each beside the plain float checkpoint that it stands for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from support.gptq import Recipe, quantize

Overrides = Callable[[str], Recipe | None]
"""From a module's name to its recipe; None leaves the module unquantized."""

EXPERT_STYLES = {
    "GPTQModel's": "{container}.{expert}.{projection}",
    "GPTQModel's for GPT-OSS": "{container}.{short}.{expert}",
    "Unsloth's": "{container}.{projection}s.{expert}",
}


def write_pair(
    folder: Path,
    model: Any,
    recipe: Recipe,
    *,
    only: str = r"(proj|w[123]|c_attn|c_fc|c_proj|fc\d|kv_b|kv_a\w*|q_[ab]\w*)$",
    overrides: Overrides | None = None,
    dynamic: dict[str, dict[str, Any]] | None = None,
    rename: tuple[str, str | Callable[[re.Match[str]], str]] | None = None,
    expert_style: str = "GPTQModel's",
    fused_bias: bool = False,
    split_gate_up: bool = False,
    layout: str = "TheBloke's",
    seed: int = 0,
) -> Path:
    """Write ``folder/gptq`` and its float twin ``folder/float``.

    Args:
        folder: An empty folder.
        model: A random transformers model in float32.
        recipe: How to quantize.
        only: Modules whose name matches this are quantized.
        overrides: A recipe of its own for some modules.
        dynamic: GPTQModel's rules, to declare ``overrides``.
        rename: Pattern and replacement for the names in the quantized files.
        expert_style: Names for experts that transformers itself stores fused.
        fused_bias: Whether their biases stay fused.
        split_gate_up: Whether interleaved gate and up are stored apart.
        layout: "TheBloke's" (parameters in both files), "AutoGPTQ's" (``gptq_model-...safetensors``, parameters
            in ``quantize_config.json`` alone), "sharded", or "config.json alone".
        seed: For the act-order permutations.

    Returns:
        ``folder/gptq``.
    """
    plain = folder / "float"
    model.save_pretrained(plain, max_shard_size="50GB")
    state = load_file(plain / "model.safetensors")
    transposed = {name for name, module in model.named_modules() if type(module).__name__ == "Conv1D"}
    rng = np.random.default_rng(seed)
    packed: dict[str, torch.Tensor] = {}

    def add(module: str, weight: torch.Tensor) -> torch.Tensor:
        own = overrides(module) if overrides else recipe
        if own is None:
            packed[f"{module}.weight"] = weight
            return weight
        tensors, dequantized = quantize(weight, own, rng)
        packed.update({f"{module}.{suffix}": tensor for suffix, tensor in tensors.items()})
        if own.zero_bias and f"{module}.bias" not in state:
            packed[f"{module}.bias"] = torch.zeros(weight.shape[0], dtype=torch.float16)
        return dequantized

    def add_expert(fused: re.Match[str], expert: int, weight: torch.Tensor) -> torch.Tensor:
        """One expert's slice of a fused weight; ``split_gate_up`` is for GPT-OSS, whose columns alternate."""
        if not model.get_submodule(fused[1]).is_transposed:
            return add(f"{fused[1]}.{expert}.{fused[2]}", weight)
        bias = state.get(f"{fused[0]}_bias")
        container, projection, _ = fused.groups()
        halves = {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2)}
        parts = halves if split_gate_up and projection == "gate_up_proj" else {projection: slice(None)}
        dequantized = torch.empty_like(weight)
        for own, columns in parts.items():
            module = EXPERT_STYLES[expert_style].format(
                container=container, projection=own, short=own.removesuffix("_proj"), expert=expert
            )
            dequantized[:, columns] = add(module, weight[:, columns].T).T
            if bias is not None and not fused_bias:
                packed[f"{module}.bias"] = bias[expert, columns].contiguous()
        return dequantized

    for name, tensor in sorted(state.items()):
        module = name.removesuffix(".weight")
        fused = re.fullmatch(r"(.+experts)\.(gate_up_proj|down_proj|up_proj)(_bias)?", name)
        if fused and fused[3]:
            packed.update({name: tensor} if fused_bias else {})
        elif fused:
            state[name] = torch.stack([add_expert(fused, *pair) for pair in enumerate(tensor)])
        elif name.endswith(".weight") and tensor.ndim == 2 and re.search(only, module):
            flip = any(module.endswith(other) or other.endswith(module) for other in transposed)
            dequantized = add(module, tensor.T if flip else tensor)
            state[name] = (dequantized.T if flip else dequantized).contiguous()
        else:
            packed[name] = tensor
    save_file(state, plain / "model.safetensors", metadata={"format": "pt"})
    if rename:
        packed = {re.sub(*rename, name): tensor for name, tensor in packed.items()}
    return _write_files(folder, plain, packed, recipe, layout, dynamic)


def _write_files(
    folder: Path, plain: Path, packed: dict[str, torch.Tensor], recipe: Recipe, layout: str, dynamic: Any
) -> Path:
    target = folder / "gptq"
    target.mkdir()
    parameters = {**recipe.config(), **({"dynamic": dynamic} if dynamic else {})}
    config = json.loads((plain / "config.json").read_text())
    if layout != "AutoGPTQ's":
        config["quantization_config"] = parameters
    (target / "config.json").write_text(json.dumps(config))
    if (plain / "generation_config.json").exists():
        (target / "generation_config.json").write_text((plain / "generation_config.json").read_text())
    stem = "model"
    if layout == "AutoGPTQ's":
        stem = f"gptq_model-{recipe.bits}bit-{recipe.group_size}g"
    if layout != "config.json alone":
        (target / "quantize_config.json").write_text(json.dumps(parameters))
    packed = {name: tensor.contiguous() for name, tensor in packed.items()}
    if layout != "sharded":
        save_file(packed, target / f"{stem}.safetensors", metadata={"format": "pt"})
        return target
    names = sorted(packed)
    halves = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, own in halves.items():
        save_file({name: packed[name] for name in own}, target / file, metadata={"format": "pt"})
    weight_map = {name: file for file, own in halves.items() for name in own}
    index = {"metadata": {"total_size": sum(t.nbytes for t in packed.values())}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    return target


def edit(checkpoint: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Rewrite the weight file of ``checkpoint`` after ``change`` has altered its tensors in place."""
    file = next(checkpoint.glob("*.safetensors"))
    state = load_file(file)
    change(state)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, file, metadata={"format": "pt"})


def drop_g_idx(state: dict[str, torch.Tensor]) -> None:
    """A change for :func:`edit`: no projection has a ``g_idx``."""
    for name in [name for name in state if name.endswith(".g_idx")]:
        del state[name]


def zero_g_idx(state: dict[str, torch.Tensor]) -> None:
    """A change for :func:`edit`: every ``g_idx`` is there, and all zeros."""
    for name in [name for name in state if name.endswith(".g_idx")]:
        state[name].zero_()


def edit_config(checkpoint: Path, **changes: Any) -> None:
    """Change quantization parameters wherever ``checkpoint`` states them; None deletes one."""
    for name in ("config.json", "quantize_config.json"):
        path = checkpoint / name
        if not path.exists():
            continue
        whole = json.loads(path.read_text())
        raw = whole.get("quantization_config") if name == "config.json" else whole
        if raw is not None:
            raw.update(changes)
            for key in [key for key, value in raw.items() if value is None]:
                del raw[key]
            path.write_text(json.dumps(whole))
