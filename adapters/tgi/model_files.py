"""What the server is loading: the GPTQ parameters, and the tensors that the files have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from graftq.plugin.checkpoint import auto_round, weight_files
from graftq.plugin.checkpoint.configuration import CONFIG, QUANTIZE_CONFIG, QuantConfig, read_written
from graftq.plugin.checkpoint.headers import CheckpointIndex, TensorInfo
from graftq.plugin.checkpoint.json_files import read_object
from graftq.plugin.checkpoint.source import Source
from graftq.plugin.checkpoint.unread import check_all_read
from graftq.quant_linear.errors import CheckpointError

INDEX = "model.safetensors.index.json"

asked_for: ContextVar[tuple[str, str | None]] = ContextVar("graftq_tgi_model")
"""Model and revision that the server is making a weights loader for."""


@dataclass(frozen=True)
class Checkpoint:
    """One model's files.

    Attributes:
        config: The GPTQ parameters; None where no file states them.
        index: All tensors.
        projections: Those of quantized projections, by module and suffix.
        file: The first file, for messages.
    """

    config: QuantConfig | None
    index: CheckpointIndex
    projections: Mapping[str, Mapping[str, TensorInfo]]
    file: str

    @classmethod
    def open(cls, model_id: str, revision: str | None, files: Sequence[str]) -> Checkpoint:
        """Read the parameters and the headers of ``files``, those that the server is going to load.

        Raises:
            CheckpointError: if parameters are damaged, a file is absent, truncated or malformed, or if the files hold
                what the server would drop or cast in silence.
        """
        source = Source(model_id, {"revision": revision} if revision else {})
        weight_map = weight_files.read_weight_map(source, INDEX) if source.cached(INDEX) else None
        config, index = read_config(source), CheckpointIndex.open(files, weight_map)
        path = source.cached(CONFIG)
        check_all_read(index, read_object(path, source.describe(CONFIG)) if path else {})
        return cls(config, index, index.projections(), files[0] if files else model_id)

    def require_config(self, weights: Any) -> QuantConfig:
        """The parameters, from wherever they are stated.

        Raises:
            CheckpointError: if nothing states them.
        """
        if self.config is not None:
            return self.config
        if not weights.has_tensor("gptq_bits"):
            reason = f"packed weights, but there is no {QUANTIZE_CONFIG}, so nothing says how to unpack them"
            raise CheckpointError(reason, file=self.file)
        # As `text-generation-server quantize` used to write them; asymmetric unless a later version says otherwise.
        stated = {"bits": "gptq_bits", "group_size": "gptq_groupsize", "sym": "gptq_sym"}
        raw = {
            key: weights.get_tensor(name, to_device=False).item()
            for key, name in stated.items()
            if weights.has_tensor(name)
        }
        return QuantConfig.from_dict({"sym": False, **raw}, self.file)


def read_config(source: Source) -> QuantConfig | None:
    """The parameters that the files state; None if they state none.

    Raises:
        CheckpointError: if they are damaged, not GPTQ's, or contradict each other.
    """
    written = read_written(source)
    return QuantConfig.from_files(written, source) if written else None


def is_gptq(quantize: str, quant_method: str) -> bool:
    """Whether the server is asked for GPTQ, and the parameters say that or AutoRound, whose packing may be GPTQ's."""
    return quantize == "gptq" and quant_method.lower() in ("gptq", *auto_round.SPELLINGS)
