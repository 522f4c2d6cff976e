"""What the files mean: a reader, a dequantizer and a float twin of its own, written from the two formats' descriptions.

Strict: where a file can be read in two ways, or in none, there is no meaning. Nothing of graftq is used.
"""

from __future__ import annotations

import json
import math
import struct
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support.models import logits
from transformers import AutoModelForCausalLM

from fuzz.checkpoint import INSIDE, NUMPY_TYPES, Checkpoint, Stored, serialize

SCALES = ("F16", "BF16", "F32")


class NoMeaning(Exception):
    """The files cannot be read in exactly one way."""


def read_tensors(content: bytes) -> dict[str, Stored]:
    """The tensors of a safetensors file."""
    if len(content) < 10:
        raise NoMeaning("no header")
    (length,) = struct.unpack("<Q", content[:8])
    if not 2 <= length <= len(content) - 8 or length > 100_000_000:
        raise NoMeaning("length of the header")
    header, data = content[8 : 8 + length], content[8 + length :]
    try:
        entries = json.loads(header.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise NoMeaning("header") from error
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise NoMeaning("metadata")
    tensors, spans = {}, []
    for name, entry in entries.items():
        if not isinstance(entry, dict) or not entry.keys() >= {"dtype", "shape", "data_offsets"}:
            raise NoMeaning("entry")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else [None]
        if any(type(number) is not int or number < 0 for number in numbers) or len(offsets) != 2:
            raise NoMeaning("numbers")
        begin, end = offsets
        if not isinstance(dtype, str) or dtype not in NUMPY_TYPES:
            raise NoMeaning("dtype")
        if math.prod(shape) * np.dtype(NUMPY_TYPES[dtype]).itemsize != end - begin or end > len(data):
            raise NoMeaning("size")
        tensors[name] = Stored(dtype, tuple(shape), data[begin:end])
        spans.append((begin, end))
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise NoMeaning("gap or overlap")
        position = end
    if position != len(data):
        raise NoMeaning("length of the data")
    return tensors


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    whole = dict(pairs)
    if any(whole[key] != value for key, value in pairs):
        raise NoMeaning("a key twice, with two values")
    return whole


def _refuse(constant: str) -> None:
    raise NoMeaning(constant)


def dequantize(checkpoint: Checkpoint, module: str, parts: dict[str, Stored]) -> np.ndarray:
    """The float32 weight [N, K] of one module, without padding.

    ``W[n, k] = (q[k, n] - z[g_idx[k], n]) * scales[g_idx[k], n]``; codes are a little-endian stream of bits down K,
    zero points along N.
    """
    bits = checkpoint.bits
    if not parts.keys() >= {"qweight", "qzeros", "scales"}:
        raise NoMeaning(f"{module}: incomplete")
    if any(parts[suffix].dtype != "I32" for suffix in ("qweight", "qzeros")) or parts["scales"].dtype not in SCALES:
        raise NoMeaning(f"{module}: dtype")
    if any(len(parts[suffix].shape) != 2 for suffix in ("qweight", "qzeros", "scales")):
        raise NoMeaning(f"{module}: rank")
    n, k = checkpoint.shapes[module]
    codes = _unpack(parts["qweight"].array(), bits)  # [K, N]
    zeros = _unpack(parts["qzeros"].array().T, bits).T + checkpoint.zero_offset  # [G, N]
    scales = parts["scales"].floats()
    groups, columns = scales.shape
    if codes.shape[0] < k or codes.shape[1] != columns or zeros.shape[0] != groups or columns < n:
        raise NoMeaning(f"{module}: shape")
    if not 0 <= zeros.shape[1] - columns < 32:
        raise NoMeaning(f"{module}: shape of the zero points")
    size = k if checkpoint.group_size == -1 else checkpoint.group_size
    g_idx = np.arange(codes.shape[0]) // size
    if "g_idx" in parts:
        stored = parts["g_idx"]
        if stored.dtype not in ("I32", "I64") or len(stored.shape) != 1 or stored.shape[0] < k:
            raise NoMeaning(f"{module}: g_idx")
        if stored.array().any() or groups == 1:
            g_idx[: stored.shape[0]] = stored.array()[: len(g_idx)]
    if g_idx[:k].min() < 0 or g_idx[:k].max() >= groups:
        raise NoMeaning(f"{module}: group out of range")
    if not np.isfinite(scales).all():
        raise NoMeaning(f"{module}: scales")
    g_idx = g_idx[:k]
    weight = (codes[:k] - zeros[g_idx, :columns]).astype(np.float32) * scales[g_idx]
    if weight[:, n:].any():
        raise NoMeaning(f"{module}: what is cut off is not zero")
    if not np.isfinite(weight).all():
        raise NoMeaning(f"{module}: overflow")
    return np.ascontiguousarray(weight[:, :n].T)


def _unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """Words [R, C] to codes [R * 32 // bits, C]."""
    stream = np.unpackbits(np.ascontiguousarray(words.T).view(np.uint8), axis=1, bitorder="little")
    count = stream.shape[1] // bits
    codes = stream[:, : count * bits].reshape(len(stream), count, bits).astype(np.int64) @ (1 << np.arange(bits))
    return codes.T


def plain_state(checkpoint: Checkpoint, tensors: dict[str, Stored]) -> dict[str, Stored]:
    """The tensors of the float twin."""
    state: dict[str, Stored] = {}
    modules: dict[str, dict[str, Stored]] = {}
    for name, tensor in tensors.items():
        module, _, suffix = name.rpartition(".")
        if suffix in ("qweight", "qzeros", "scales", "g_idx"):
            modules.setdefault(module, {})[suffix] = tensor
        else:
            state[name] = tensor
    for module, parts in modules.items():
        if module not in checkpoint.shapes or f"{module}.weight" in state:
            raise NoMeaning(f"{module}: packed, and should not be")
        state[f"{module}.weight"] = Stored.of(dequantize(checkpoint, module, parts))
        bias = state.get(f"{module}.bias")
        if bias is not None and bias.shape[0] > checkpoint.shapes[module][0]:
            state[f"{module}.bias"] = bias = Stored.of(bias.floats()[: checkpoint.shapes[module][0]])
        if bias is not None and not _may_have_bias(checkpoint, module) and not bias.floats().any():
            del state[f"{module}.bias"]  # AutoGPTQ writes one of zeros for every layer
    return state


def _may_have_bias(checkpoint: Checkpoint, module: str) -> bool:
    kinds = {"attention_bias": ".self_attn.", "mlp_bias": ".mlp."}
    return any(checkpoint.config.get(field) and part in module for field, part in kinds.items())


def tensors_of(folder: Path) -> dict[str, Stored]:
    """All tensors of a folder's safetensors files."""
    tensors: dict[str, Stored] = {}
    for file in sorted(file for file in folder.glob("*.safetensors") if file.is_file()):
        for name, tensor in read_tensors(file.read_bytes()).items():
            if tensors.setdefault(name, tensor) != tensor:
                raise NoMeaning(f"{name}: two files, two contents")
    return tensors


def twin_logits(checkpoint: Checkpoint, state: dict[str, Stored], dtype: torch.dtype | None = None) -> torch.Tensor:
    """Logits of the float model that transformers makes of ``state`` and of the model's fields.

    Raises:
        NoMeaning: if tensors are missing, or do not fit.
        Exception: whatever transformers raises.
    """
    with tempfile.TemporaryDirectory() as folder:
        text = json.dumps(checkpoint.config).encode()
        Path(folder, INSIDE).write_bytes(checkpoint.rewrite.get(INSIDE, bytes)(text))
        Path(folder, "model.safetensors").write_bytes(serialize(state))
        # The experts' other implementation has no float64.
        arguments = {} if dtype is None else {"dtype": dtype, "experts_implementation": "eager"}
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **arguments)
    if info["missing_keys"] or info["mismatched_keys"]:
        raise NoMeaning("the model has other weights")
    for name in info["unexpected_keys"]:
        if name.endswith(".bias") and name in state and not state[name].floats().any():
            continue  # AutoGPTQ's, where the model does not have the bias that its configuration speaks of
        if name not in state or name in checkpoint.plain or _is_of_packed(checkpoint, name):
            raise NoMeaning(f"{name} has no place")
    found = logits(model)
    if not found.isfinite().all():
        raise NoMeaning("the model overflows")
    return found


def _is_of_packed(checkpoint: Checkpoint, name: str) -> bool:
    module, _, own = name.rpartition(".")
    return module in checkpoint.shapes and own in ("weight", "bias")
