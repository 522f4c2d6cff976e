"""What a checkpoint holds and nothing would read, found by names and dtypes alone.

For frameworks that stream tensors into a model, and do not say what was left over.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from graftq.plugin.checkpoint.headers import CheckpointIndex, TensorInfo
from graftq.quant_linear.errors import CheckpointError

FLOATS = ("F16", "BF16", "F32", "F64", "torch.float64")
"""Dtypes of plain weights, as :class:`TensorInfo` names them."""

DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""What models' configurations call the number of layers."""

MORE_LAYERS = re.compile("mtp|nextn")
"""Part of what they call the number of layers that predict further tokens, which are numbered on from the others."""

LANGUAGE = re.compile(r"(.*\.)?language_model\.|model\.layers\.")
"""How names in the language model begin, where a model has other parts."""


def check_all_read(index: CheckpointIndex, config: Mapping[str, Any]) -> None:
    """Refuse what would be left out of a model, or cast to what it does not mean, in silence.

    Args:
        index: The tensors.
        config: The model's ``config.json``.

    Raises:
        CheckpointError: for a projection that is there packed and plain, a weight in a dtype that needs a scale,
            and packed layers beyond the model's last.
    """
    packed = index.projections()
    for name, info in index.tensors.items():
        if name.endswith(".weight"):
            refuse_unread(info)
    for module in beyond_the_last_layer(packed, config):
        file = next(iter(packed[module].values())).file
        raise CheckpointError("packed, but the model has no place for it", file=file, module=module)


def refuse_unread(info: TensorInfo) -> None:
    """Raise for a plain weight in a dtype that means nothing without a scale, or none at all.

    Frameworks would cast 8-bit floats and leave the scales beside them where they are.

    Raises:
        CheckpointError: naming the tensor and its dtype.
    """
    if info.dtype in FLOATS:
        return
    if info.dtype.startswith(("F", "torch.float")):
        raise CheckpointError(f"dtype {info.dtype}, which nothing here reads", file=info.file, module=info.name)
    raise CheckpointError(f"dtype {info.dtype} for a weight of floats", file=info.file, module=info.name)


def beyond_the_last_layer(modules: Iterable[str], config: Mapping[str, Any]) -> list[str]:
    """The modules that are numbered as layers which the model does not have.

    The first number in a name is its layer's, in a model of one stack of layers. In a model of several, only names in
    the language model can be judged.

    Args:
        modules: Names as stored.
        config: The model's ``config.json``.
    """
    parts = {key for key, value in config.items() if key.endswith("_config") and isinstance(value, Mapping)}
    holder: Mapping[str, Any] = config["text_config"] if "text_config" in parts else config
    depth = next((holder[key] for key in DEPTHS if type(holder.get(key)) is int), None)
    if depth is None or "decoder_layers" in holder:
        return []
    last = depth + sum(size for key, size in holder.items() if MORE_LAYERS.search(key) and type(size) is int)
    pattern = LANGUAGE if parts - {"quantization_config"} else re.compile("")
    numbers = ((name, re.search(r"\.(\d+)\.", name)) for name in modules if pattern.match(name))
    return [name for name, found in numbers if found and int(found[1][:9]) >= last]
