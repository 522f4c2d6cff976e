"""One call of ``from_pretrained``: what is known of its checkpoint, from the first argument to the open files."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from graftq.adapters.transformers.parameters import as_parameters, declared_in
from graftq.plugin import switches
from graftq.plugin.checkpoint import auto_round, unlabeled, weight_files
from graftq.plugin.checkpoint.configuration import CONFIG, QUANTIZE_CONFIG, QuantConfig, read_method, read_written
from graftq.plugin.checkpoint.fields import brief, check_file_name
from graftq.plugin.checkpoint.headers import PICKLE_ENDINGS, CheckpointIndex
from graftq.plugin.checkpoint.source import HUB_ARGUMENTS, Source
from graftq.plugin.checkpoint.validation import is_gptq
from graftq.quant_linear.errors import CheckpointError

OTHER_READERS = (auto_round.METHOD,)
"""Methods of transformers' own that store GPTQ's tensors, and read them by themselves."""

Files = tuple[Sequence[str], Mapping[str, Any] | None]
"""Paths of weight files, and the index's metadata where there is one."""

_current: ContextVar[Loading | None] = ContextVar("graftq_loading", default=None)


@dataclass
class Loading:
    """State of one ``from_pretrained`` call.

    Attributes:
        source: Where the checkpoint is; None if the caller hands in a state dict.
        arguments: The keyword arguments of the call.
        config: The GPTQ parameters, once found; None if this is not a GPTQ checkpoint.
        method: The ``quant_method`` that ``config.json`` names, if any.
        index: The tensors of the files, once these are resolved.
    """

    source: Source | None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    config: QuantConfig | None = None
    method: str | None = None
    index: CheckpointIndex | None = None

    def read_configuration(self, config: Any, argument: Any = None) -> Any:
        """Find the GPTQ parameters, and put them where transformers looks, in the form that it recognizes.

        Args:
            config: The model's configuration.
            argument: The caller's ``quantization_config``. It counts where no file has parameters and the weights are
                packed: then it does not say how to quantize them.

        Returns:
            ``argument``, or None once it stands in ``config``.

        Raises:
            CheckpointError: if they are not GPTQ's, damaged, or contradict each other, or if they name another method
                and the files are GPTQ's.
        """
        holder, given = declared_in(config)
        where = self.source.describe(CONFIG) if self.source else CONFIG
        if given is not None:
            self.method = read_method(given, where)
            if self.method == auto_round.METHOD:
                if _is_left_to_auto_round(given, argument, where):
                    return argument
            elif self.method != "gptq":
                self._refuse_other_method()
                return argument
        if self.source is None:
            written = {} if given is None else {CONFIG: given}
        else:
            written = read_written(self.source, given)
        if not written and given is None:
            stated = self._stated_by(argument)
            if stated is None:
                return argument
            written, argument = {"quantization_config": stated}, None
        written = written or {CONFIG: {}}  # transformers takes an empty object for parameters, too
        self.config = QuantConfig.from_files(written, self.source or Source(""))
        self.method = "gptq"
        raw = {**next(iter(written.values())), "quant_method": "gptq", "bits": self.config.declared.bits}
        if raw.get("group_size") is not None:
            raw["group_size"] = self.config.declared.group_size
        holder.quantization_config = raw
        return argument

    def _stated_by(self, argument: Any) -> Mapping[str, Any] | None:
        """The parameters of packed weights that the caller states; None if he states none, or wants to quantize."""
        parameters = as_parameters(argument)
        if parameters is None or self.source is None or read_method(parameters, "quantization_config") != "gptq":
            return None
        dataset = argument.get("dataset") if isinstance(argument, Mapping) else getattr(argument, "dataset", None)
        if dataset is not None and not self.source.is_local:
            return None
        return parameters if unlabeled.find_packed(self.source, self._allows_pickles) else None

    @property
    def _allows_pickles(self) -> bool:
        return self.arguments.get("use_safetensors") is False

    def _refuse_other_method(self) -> None:
        """Raise if a folder's weights are GPTQ's tensors; before the other method asks for its own, or its package."""
        if self.source is None or not self.source.is_local or not self._is_misread():
            return
        found = unlabeled.find_packed(self.source, allows_pickles=False)
        if found is not None and found[1] is not None:
            self._refuse_packed(found[1])

    def _is_misread(self) -> bool:
        """Whether what is going to read the files, if anything is, takes GPTQ's tensors for something else."""
        from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

        reader = AUTO_QUANTIZER_MAPPING.get(self.method or "")
        is_stock = reader is not None and reader.__module__.startswith("transformers.")
        return reader is None or (is_stock and self.method not in OTHER_READERS)

    def _refuse_packed(self, index: CheckpointIndex) -> None:
        packed = next((name for name, infos in index.packed().items() if is_gptq(infos)), None)
        if packed is not None:
            assert self.source is not None
            reason = f"packed weights as GPTQ stores them, but quant_method is {brief(self.method)}"
            raise CheckpointError(reason, file=self.source.describe(CONFIG), module=packed)

    def find_weights(self, arguments: dict[str, Any]) -> str | None:
        """Name the weight file, in ``arguments`` of transformers' resolver, where that would not find it.

        Returns:
            The path of a pickle, if the user has allowed pickles and there is nothing better.

        Raises:
            CheckpointError: if only pickles are there, or several files that could be meant.
        """
        assert self.source is not None
        assert self.config is not None
        explicit = arguments.get("transformers_explicit_filename")
        for part in explicit.split("/") if explicit else ():  # `transformers_weights` in config.json
            check_file_name(part, "transformers_weights", self.source.describe(CONFIG))
        if explicit and explicit.endswith(PICKLE_ENDINGS):  # transformers itself wants a safetensors file there
            if not self._allows_pickles:
                raise weight_files.pickle_refused(self.source, explicit)
            return self.source.fetch(explicit)
        if explicit or arguments.get("variant"):
            return None
        name = weight_files.find_safetensors(self.source, self.config)
        if name is not None:
            if name.endswith(".index.json"):
                weight_files.read_weight_map(self.source, name, needs_metadata=True)
            arguments["transformers_explicit_filename"] = name
            return None
        pickles = weight_files.find_pickles(self.source, self.config)
        if not pickles:
            return None  # transformers says what it looked for
        if not self._allows_pickles:
            raise weight_files.pickle_refused(self.source, pickles[0])
        name = weight_files.the_only(self.source, pickles)
        assert name is not None  # there are pickles
        return self.source.fetch(name)

    def open_index(self, files: Sequence[str], metadata: Mapping[str, Any] | None) -> None:
        """Read the headers of the resolved files.

        Raises:
            CheckpointError: if one is absent, truncated or malformed.
        """
        self.index = CheckpointIndex.open(files, (metadata or {}).get("weight_map"))

    def refuse_unlabeled(self, files: Sequence[str] | None, metadata: Mapping[str, Any] | None) -> None:
        """Raise if the files hold packed tensors that nobody is going to unpack.

        transformers loads a checkpoint without quantization parameters, or with a ``quant_method`` it does
        not know, as if it were not quantized: random weights, and a warning.
        """
        if not files or self.source is None or (self.method and not self._is_misread()):
            return
        is_registered, is_safe = self._is_registered(), files[0].endswith(".safetensors")
        index: CheckpointIndex | None = None
        if metadata and "weight_map" in metadata:
            packed = unlabeled.packed_name(list(metadata["weight_map"]))
        elif is_safe:
            index = CheckpointIndex.open(files)
            packed = unlabeled.packed_name(list(index.tensors))
        elif not is_registered:
            packed = os.path.basename(files[0]) if unlabeled.mentions_packed(files[0]) else None
        else:
            return
        if packed is None:
            return
        if is_registered or is_safe:
            index = index or CheckpointIndex.open(files)
        if is_registered and index is not None:
            self._refuse_packed(index)
            return
        raise self._unlabeled(packed, index)

    def refuse_unfound(self) -> None:
        """Raise for packed weights in a file that the framework does not look for, and that no file describes."""
        if self.source is None or self.method is not None or not self.source.is_local:
            return
        found = unlabeled.find_packed(self.source, self._allows_pickles)
        if found is not None:
            raise self._unlabeled(*found)

    def _unlabeled(self, packed: str, index: CheckpointIndex | None) -> CheckpointError:
        assert self.source is not None
        why = f"quant_method is {brief(self.method)}" if self.method else f"there is no {QUANTIZE_CONFIG}"
        return unlabeled.refusal(why, self.source.describe(CONFIG), packed, index)

    def _is_registered(self) -> bool:
        from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

        return self.method in AUTO_QUANTIZER_MAPPING


def _is_left_to_auto_round(given: Mapping[str, Any], argument: Any, where: str) -> bool:
    """Whether AutoRound's package reads its checkpoint: it is asked for, or is there and the packing is not GPTQ's."""
    if given.get("quant_method") != auto_round.METHOD:  # which transformers does not know
        return False
    if type(argument).__name__ == "AutoRoundConfig":
        return True
    return importlib.util.find_spec("auto_round") is not None and auto_round.refusal(given, where) is not None


def remember_source(original: Any) -> Any:
    """``from_pretrained``, a class method, that makes each of its calls known to the seams inside it.

    None of the inner functions gets told where the checkpoint comes from.
    """
    function = original.__func__

    @functools.wraps(function)
    def from_pretrained(cls: type, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        with _begin(pretrained_model_name_or_path, kwargs):
            found = function(cls, pretrained_model_name_or_path, *args, **kwargs)
        if tokens := switches.number(switches.WARM_UP):
            from graftq.adapters.transformers.warmup import warm_up_packed  # which few ask for

            warm_up_packed(found[0] if isinstance(found, tuple) else found, tokens)
        return found

    return classmethod(from_pretrained)


def resolve_by(
    find: Callable[[Loading, Callable[..., Files], tuple[Any, ...], dict[str, Any]], Files],
) -> Callable[[Callable[..., Files]], Callable[..., Files]]:
    """For ``_get_resolved_checkpoint_files``: let ``find`` name a GPTQ checkpoint's files, and read their headers.

    ``find`` gets the call under way, the original function, and the arguments of that.
    """

    def wrap(original: Callable[..., Files]) -> Callable[..., Files]:
        @functools.wraps(original)
        def _get_resolved_checkpoint_files(*args: Any, **kwargs: Any) -> Files:
            here = current()
            if here is None or here.source is None or kwargs.get("gguf_file") is not None:
                return original(*args, **kwargs)
            if here.config is None:
                try:
                    files, metadata = original(*args, **kwargs)
                except OSError:
                    here.refuse_unfound()
                    raise
                here.refuse_unlabeled(files, metadata)
            else:
                files, metadata = find(here, original, args, kwargs)
                here.open_index(files, metadata)
            return files, metadata

        return _get_resolved_checkpoint_files

    return wrap


@contextmanager
def _begin(name: Any, arguments: Mapping[str, Any]) -> Iterator[None]:
    hub = {key: arguments[key] for key in HUB_ARGUMENTS if arguments.get(key) is not None}
    source = None if name is None or os.path.isfile(str(name)) else Source(str(name), hub)
    token = _current.set(Loading(source, arguments))
    try:
        yield
    finally:
        _current.reset(token)


def current() -> Loading | None:
    """The innermost ``from_pretrained`` call under way in this context."""
    return _current.get()
