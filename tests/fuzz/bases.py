"""The undamaged checkpoints that mutations start from."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from support.checkpoints import write_pair
from support.gptq import Recipe
from support.models import tiny

from fuzz.checkpoint import BESIDE, INDEX, INSIDE, Checkpoint, Stored
from fuzz.truth import read_tensors

RECIPES = (
    Recipe(4, 32, True, True),
    Recipe(4, 32, False, True),
    Recipe(4, 32, True, False),
    Recipe(4, 32, False, False, "gptq_v2"),
    Recipe(4, 32, True, True, "gptq_v2", scales=torch.float32),
    Recipe(4, -1, False, True, zero_bias=True),
    Recipe(8, 32, True, True, scales=torch.bfloat16),
    Recipe(8, -1, False, False),
    Recipe(2, 32, False, True),
    Recipe(2, 16, True, False, scales=torch.float32),
    Recipe(3, 32, True, True),
    Recipe(3, 32, False, False),
    Recipe(4, 128, False, True),
    Recipe(2, 128, False, False),
)
LAYOUTS = ("TheBloke's", "AutoGPTQ's", "sharded", "config.json alone")


@dataclass(frozen=True)
class Base:
    """Which one."""

    architecture: str
    recipe: Recipe
    layout: str

    def __str__(self) -> str:
        return f"{self.architecture}, {self.recipe}, {self.layout}"

    def matches(self, **wanted: object) -> bool:
        """Whether it has these attributes, of its own or of its recipe."""
        return all({**vars(self.recipe), **vars(self)}[key] == value for key, value in wanted.items())

    def checkpoint(self) -> Checkpoint:
        """A fresh copy."""
        return copy.deepcopy(_make(self)[0])

    def twin(self) -> dict[str, Stored]:
        """The float weights that its packed ones were made to stand for."""
        return _make(self)[1]


BASES = tuple(
    Base(architecture, recipe, layout)
    for architecture in ("llama", "mixtral")
    for recipe in RECIPES
    for layout in LAYOUTS
)


@functools.cache
def _make(base: Base) -> tuple[Checkpoint, dict[str, Stored]]:
    with tempfile.TemporaryDirectory() as parent, contextlib.redirect_stderr(io.StringIO()):
        folder = write_pair(Path(parent), tiny(base.architecture), base.recipe, layout=base.layout)
        texts = {name: _json(folder / name) for name in (INSIDE, BESIDE, INDEX)}
        shards = {file.name: read_tensors(file.read_bytes()) for file in sorted(folder.glob("*.safetensors"))}
        twin = read_tensors((Path(parent) / "float/model.safetensors").read_bytes())
    tensors = {name: tensor for content in shards.values() for name, tensor in content.items()}
    modules = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    checkpoint = Checkpoint(
        config={key: value for key, value in texts[INSIDE].items() if key != "quantization_config"},
        inside=texts[INSIDE].get("quantization_config"),
        beside=texts[BESIDE],
        shards=shards,
        index=texts[INDEX],
        bits=base.recipe.bits,
        group_size=base.recipe.group_size,
        zero_offset=0 if base.recipe.checkpoint_format == "gptq_v2" else 1,
        shapes={module: twin[f"{module}.weight"].shape for module in modules},
        plain=frozenset(name for name in tensors if name.rpartition(".")[0] not in modules),
    )
    return checkpoint, twin


def _json(file: Path):
    return json.loads(file.read_text()) if file.exists() else None
