"""Finding a checkpoint's weight files by name, wherever and however its writer called them."""

from __future__ import annotations

from collections.abc import Sequence

from graftq.plugin.checkpoint.configuration import QUANTIZE_CONFIG, QuantConfig
from graftq.plugin.checkpoint.fields import brief, check_file_name
from graftq.plugin.checkpoint.headers import PICKLE_ENDINGS
from graftq.plugin.checkpoint.json_files import read_object
from graftq.plugin.checkpoint.source import Source
from graftq.quant_linear.errors import CheckpointError

SAFE_ENDINGS = (".safetensors", ".safetensors.index.json")
NOT_WEIGHTS = ("adapter_model", "consolidated", "training_args", "optimizer", "scheduler", "rng_state")


def find_safetensors(source: Source, config: QuantConfig) -> str | None:
    """Name of the safetensors file, or of the index of shards, that holds the weights; None if there is none.

    Raises:
        CheckpointError: if several files could be meant.
    """
    for stem in ("model", *config.weight_names):
        for ending in SAFE_ENDINGS:
            if source.has(stem + ending):
                return stem + ending
    return the_only(source, [name for name in _candidates(source) if name.endswith(SAFE_ENDINGS)])


def find_pickles(source: Source, config: QuantConfig) -> list[str]:
    """Names of the pickles that may hold the weights; the one that is named, if there is one."""
    named = [stem + ending for stem in config.weight_names for ending in PICKLE_ENDINGS]
    if found := next((name for name in named if source.has(name)), None):
        return [found]
    if candidates := [name for name in _candidates(source) if name.endswith(PICKLE_ENDINGS)]:
        return candidates
    return [name for name in (f"pytorch_model{ending}" for ending in PICKLE_ENDINGS) if source.has(name)]


def pickle_refused(source: Source, name: str) -> CheckpointError:
    """What to tell a user whose checkpoint has no other weights than pickles like ``name``."""
    return CheckpointError(
        "only pickle files here, and a pickle can run any code. Convert it: load it with "
        "torch.load(..., weights_only=True) and write it with safetensors.torch.save_file; "
        "or allow it with from_pretrained(..., use_safetensors=False)",
        file=source.describe(name),
    )


def read_weight_map(source: Source, index: str, needs_metadata: bool = False) -> dict[str, str]:
    """Tensor name to file name, from an index of shards; some readers want its metadata, too.

    Raises:
        CheckpointError: if the index is malformed, names a file outside, or one that is absent.
    """
    path = source.fetch(index)
    content = read_object(path, source.describe(index)) if path else {}
    weight_map = content.get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(shard, str) for shard in weight_map.values())
    ):
        raise CheckpointError("no weight_map in the index", file=source.describe(index))
    if needs_metadata and not isinstance(content.get("metadata"), dict):
        raise CheckpointError("no metadata in the index", file=source.describe(index))
    for shard in sorted(set(weight_map.values())):
        check_file_name(shard, "the index", source.describe(index))
        if not shard.endswith(".safetensors"):  # a pickle, say, that the user has not allowed
            reason = f"the index names {brief(shard)}, which is not a safetensors file"
            raise CheckpointError(reason, file=source.describe(index))
        if source.is_local and source.fetch(shard) is None:
            raise CheckpointError("the index names this file, and it is absent", file=source.describe(shard))
    return weight_map


def the_only(source: Source, names: Sequence[str]) -> str | None:
    """The index among ``names``, or the single one of them; None if there are none.

    Raises:
        CheckpointError: if several files could be meant.
    """
    indices = [name for name in names if name.endswith(".index.json")]
    found = indices or list(names)
    if len(found) > 1:
        raise CheckpointError(
            f"several weight files, and nothing says which: {', '.join(found)}. Name one (without its ending) "
            f"as model_file_base_name in {QUANTIZE_CONFIG}",
            file=source.describe(""),
        )
    return found[0] if found else None


def _candidates(source: Source) -> list[str]:
    return [name for name in source.names() if not name.startswith(NOT_WEIGHTS)]
