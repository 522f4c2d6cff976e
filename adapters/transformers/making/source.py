"""A float checkpoint on disk, of which one block at a time is in memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from graftq.adapters.transformers.making.blocks import find_blocks
from graftq.plugin.checkpoint.headers import CheckpointIndex
from graftq.quant_linear.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class FloatCheckpoint:
    """A folder of safetensors files and the skeleton of its model.

    Args:
        folder: The checkpoint.
        dtype: What blocks are run in.
        device: Where.
        blocks: The name of the list of blocks, if it is not to be found.

    Raises:
        CheckpointError: if the files are not there, or damaged.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device, blocks: str | None = None):
        self.folder, self.dtype, self.device = folder, dtype, device
        self.config = AutoConfig.from_pretrained(folder)
        if getattr(self.config, "quantization_config", None) is not None:
            raise CheckpointError("this checkpoint is quantized already", file=str(folder))
        files = sorted(set(self._files()))
        self.index = CheckpointIndex.open([str(folder / file) for file in files])
        with init_empty_weights(include_buffers=False):
            self.model = AutoModelForCausalLM.from_config(self.config, dtype=dtype).eval()
        self.model.tie_weights()
        self.blocks_name, self.blocks = find_blocks(self.model, blocks)
        self.conversions = get_model_conversion_mapping(self.model)
        self.targets = self._targets()

    def _files(self) -> Iterable[str]:
        index = self.folder / INDEX
        if index.is_file():
            return json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        if (self.folder / SINGLE).is_file():
            return [SINGLE]
        raise CheckpointError(f"neither {INDEX} nor {SINGLE} in this folder", file=str(self.folder))

    def _targets(self) -> dict[str, list[str]]:
        """The parameters of the model that each tensor of the files becomes, or becomes part of."""
        renamings = [entry for entry in self.conversions if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self.conversions if isinstance(entry, WeightConverter)]
        known = self.model.state_dict()  # once: it takes milliseconds, and there may be 18,867 tensors
        prefix = self.model.base_model_prefix
        found = {}
        for name in self.index.tensors:
            renamed, source = rename_source_key(name, renamings, converters, prefix, known)
            if source is None:
                found[name] = [name if renamed not in known and name in known else renamed]
            else:
                patterns = next(entry.target_patterns for entry in converters if source in entry.source_patterns)
                found[name] = [renamed.replace(patterns[0], pattern) for pattern in patterns]
        return found

    def names(self, prefix: str) -> list[str]:
        """Tensors of the files that become parameters of a module."""
        return [name for name, found in self.targets.items() if found[0].startswith(f"{prefix}.")]

    def rest(self) -> list[str]:
        """Tensors of the files that belong to no block."""
        return [name for name, found in self.targets.items() if not found[0].startswith(f"{self.blocks_name}.")]

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Tensors as they are stored."""
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self.index.tensors[name].file, []).append(name)
        found = {}
        for file, own in by_file.items():
            with safe_open(file, framework="pt") as handle:
                found.update({name: handle.get_tensor(name) for name in own})
        return found

    def load(self, names: Iterable[str]) -> None:
        """Put tensors of the files into the model.

        Raises:
            CheckpointError: if one cannot be converted.
        """
        mapping: Any = self.conversions
        config = LoadStateDictConfig(weight_mapping=mapping, dtype=self.dtype, device_map={"": self.device})
        info = convert_and_load_state_dict_in_model(model=self.model, state_dict=self.read(names), load_config=config)
        info = info[0] if isinstance(info, tuple) else info
        problems = [*info.error_msgs, *map(str, info.mismatched_keys), *map(str, info.conversion_errors)]
        if problems:
            raise CheckpointError(problems[0], file=str(self.folder))

    def load_rest(self) -> None:
        """Embeddings, norms, the head."""
        self.load(self.rest())
        self.model.tie_weights()
        for name, buffer in self.model.named_buffers():
            holder, _, own = name.rpartition(".")
            setattr(self.model.get_submodule(holder), own, buffer.to(self.device))

    def load_block(self, number: int) -> nn.Module:
        """A block with its weights.

        Raises:
            CheckpointError: if a weight is not in the files.
        """
        name = f"{self.blocks_name}.{number}"
        self.load(self.names(name))
        block = self.blocks[number]
        for own, parameter in block.named_parameters():
            if parameter.is_meta:
                raise CheckpointError("no tensor in the checkpoint for this weight", module=f"{name}.{own}")
        return block

    def drop_block(self, number: int) -> None:
        """Let a block's weights go."""
        for module in self.blocks[number].modules():
            for own, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, own, nn.Parameter(parameter.to("meta"), requires_grad=False))

    def fingerprint(self) -> str:
        """A SHA-256 of all headers: names, shapes, dtypes, places and sizes of files."""
        digest = hashlib.sha256()
        for name, info in sorted(self.index.tensors.items()):
            digest.update(f"{name} {info.dtype} {info.shape} {info.offset} {Path(info.file).name}\n".encode())
        for file in sorted({info.file for info in self.index.tensors.values()}):
            digest.update(str(Path(file).stat().st_size).encode())
        return digest.hexdigest()


def replaced_by(made: Mapping[str, Any]) -> set[str]:
    """Parameters of the model that packed projections (by target, with their containers) stand for."""
    found = set()
    for target, container in made.items():
        if container:
            own = target.rpartition(".")[2]
            found |= {f"{container}.{name}" for name in ((own,) if own == "down_proj" else ("gate_up_proj", "up_proj"))}
        else:
            found |= {f"{target}.weight", f"{target}.bias"}
    return found
