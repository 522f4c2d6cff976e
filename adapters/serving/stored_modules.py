"""What the checkpoint's files say is quantized, by the names that an engine gives to modules.

Engines stream tensors into layers and say neither which file they come from nor, to a layer that is being made, whether
any will come. So the headers are looked at beforehand.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch

from graftq.plugin.checkpoint.fields import is_index
from graftq.plugin.checkpoint.headers import PICKLE_ENDINGS, CheckpointIndex
from graftq.plugin.checkpoint.json_files import read_object
from graftq.plugin.checkpoint.source import Source
from graftq.plugin.checkpoint.unlabeled import PACKED
from graftq.plugin.checkpoint.unread import check_all_read
from graftq.plugin.checkpoint.weight_files import NOT_WEIGHTS, SAFE_ENDINGS, read_weight_map
from graftq.quant_linear.errors import CheckpointError

Mapper = Callable[[list[str]], list[str]]
"""From names as stored to the engine's, as ``WeightsMapper.apply_list``; what it drops is missing from the result."""

RemoteNames = Callable[[Source], Iterable[str]]
"""The names of a repository's tensors, asked of the Hub before its files are downloaded."""


class StoredModules:
    """The quantized modules of one checkpoint.

    Args:
        source: Where the checkpoint is.
        engine: The engine's name, for messages.
        remote_names: Asks for the tensors of files that are not on this machine yet.
    """

    def __init__(self, source: Source, engine: str, remote_names: RemoteNames):
        self.source = source
        self.engine = engine
        self._remote_names = remote_names
        self._mappers: list[Mapper] = []
        self._is_checked = False

    def rename(self, mapper: Mapper) -> None:
        """Apply a model's renaming to all names; models bring theirs while they are being made."""
        self._mappers.append(mapper)
        for name in ("quantized", "plain", "_tails"):
            self.__dict__.pop(name, None)

    def layer(self, prefix: str, parts: Sequence[str] = ()) -> list[str]:
        """The stored names of a linear layer's projections; empty if it is not quantized.

        Args:
            prefix: The engine's name of the layer.
            parts: What the engine has fused into it, by the last part of their names (``q_proj``, ...).

        Raises:
            CheckpointError: if only some of the parts are quantized.
        """
        if prefix in self.quantized:
            return [self.quantized[prefix]]
        parent = prefix.rpartition(".")[0]
        names = [f"{parent}.{part}" if parent else part for part in parts]
        found = [name for name in names if name in self.quantized]
        if found and len(found) == len(names):
            return [self.quantized[name] for name in names]
        if found:
            other = next(name for name in names if name not in found)
            raise CheckpointError(
                f"quantized, but {other} is not, and {self.engine} holds both in one layer, {prefix}",
                file=self.file_of(self.quantized[found[0]]),
                module=self.quantized[found[0]],
            )
        if prefix in self.plain or any(name in self.plain for name in names):
            return []
        # A model that renames in code of its own: what follows the first number is the same in all namings.
        tails = [self._tails.get(tail) for tail in map(_tail, [prefix, *names]) if tail]
        return [name for name in tails if name]

    def experts(self, prefix: str) -> dict[tuple[int, str], str]:
        """The stored names of the experts' projections below ``prefix``, by number and name; empty if not quantized."""
        prefix = prefix.removesuffix(".routed_experts")
        found = _below(prefix, self.quantized)
        if not found and not any(name.startswith(f"{prefix}.") for name in self.plain):
            found = _below(_tail(prefix), self._tails)  # as for linear layers
        return found

    def explain(self, error: CheckpointError) -> CheckpointError:
        """The same error, with the file that shows it."""
        if error.file or not error.module:
            return error
        return CheckpointError(error.reason, file=self.file_of(error.module), module=error.module)

    def file_of(self, name: str) -> str:
        """The file that holds a tensor, or a tensor of a module; the checkpoint's own name if that cannot be told."""
        for tensor, info in self.index.tensors.items():
            if tensor == name or tensor.startswith(f"{name}."):
                return info.file
        return self.source.name

    def idle_bias(self, stored: str) -> torch.Tensor | None:
        """The bias that the files hold for a module, to be asked for where the model's layer has none."""
        name = f"{stored}.bias"
        if name not in self.index.tensors:
            return None
        return next(tensor for _, tensor in self.index.read([name])).clone()

    @cached_property
    def index(self) -> CheckpointIndex:
        """The headers of the files on this machine; complete once the engine has downloaded them."""
        config = self.source.cached("config.json")
        return CheckpointIndex({}) if config is None else CheckpointIndex.open(_weight_files(Path(config).parent))

    def check(self) -> None:
        """Look once for what no layer would read; to be asked when all files are on this machine.

        Raises:
            CheckpointError: naming it; an engine would drop it, or cast it, in silence.
        """
        if not self._is_checked:
            config = self.source.cached("config.json")
            check_all_read(self.index, read_object(config, config) if config else {})
            self._is_checked = True

    @cached_property
    def names(self) -> frozenset[str]:
        """All tensors' names as stored.

        Raises:
            CheckpointError: if nobody can tell them before loading.
        """
        names = frozenset(self.index.tensors if self.source.is_local else self._remote_names(self.source))
        if not names:
            raise CheckpointError("no weight file whose header could be read", file=self.source.name)
        return names

    @cached_property
    def quantized(self) -> dict[str, str]:
        """Modules with packed tensors: the engine's name to the stored one."""
        stored = sorted({name.rpartition(".")[0] for name in self.names if name.endswith(PACKED)})
        return {new: name for name in stored if (new := self._map(name, ".qweight"))}

    @cached_property
    def plain(self) -> frozenset[str]:
        """Modules with a plain weight, by the engine's names."""
        stored = {name.removesuffix(".weight") for name in self.names if name.endswith(".weight")}
        return frozenset(new for name in stored if (new := self._map(name, ".weight")))

    @cached_property
    def _tails(self) -> dict[str, str]:
        return {tail: stored for name, stored in self.quantized.items() if (tail := _tail(name))}

    def _map(self, name: str, suffix: str) -> str:
        names = [name + suffix]  # patterns may expect a tensor's name
        for mapper in self._mappers:
            names = mapper(names)
        return names[0].removesuffix(suffix) if names else ""


def _below(prefix: str, modules: Mapping[str, str]) -> dict[tuple[int, str], str]:
    found = {}
    for name, stored in modules.items():
        if prefix and name.startswith(f"{prefix}."):
            first, _, second = name[len(prefix) + 1 :].partition(".")
            number, own = (first, second) if is_index(first) else (second, first)
            if is_index(number):
                found[int(number), own] = stored
    return found


def _tail(name: str) -> str:
    found = re.search(r"[^.]+\.\d+\..+$", name)
    return found[0] if found else ""


def _weight_files(folder: Path) -> list[str]:
    """The files that engines load: those that an index names, else all safetensors, else pickles."""
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith(NOT_WEIGHTS))
    indices = [name for name in names if name.endswith(SAFE_ENDINGS[1])]
    if indices:
        names = sorted(set(read_weight_map(Source(str(folder)), indices[0]).values()))
    else:
        safe = [name for name in names if name.endswith(SAFE_ENDINGS[0])]
        names = safe or [name for name in names if name.endswith(PICKLE_ENDINGS)]
    return [str(folder / name) for name in names]
