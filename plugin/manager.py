"""Finds adapters and kernel providers, ours and third parties', and keeps a broken one from harming the rest."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Set
from importlib.metadata import entry_points
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pluggy

from graftq.plugin import failures, hookspecs, switches
from graftq.plugin.failures import CONTAINED

if TYPE_CHECKING:
    from graftq.quant_linear.selection import KernelProvider, Rejected, Request, Selection

ADAPTERS = "graftq.adapters"
KERNELS = "graftq.kernels"
OWN = f"{KERNELS}:graftq."
logger = logging.getLogger("graftq")

_reported: set[str] = set()
"""Slow fallbacks that have been reported, with device and reasons."""

_prepared: set[str] = set()
"""Providers that are ready to run, by name."""

_unusable: dict[str, Rejected] = {}
"""Providers whose preparation has failed, by name."""

REFERENCE = "torch"
PROVIDER_CALLS = ("judge", "layout", "linear")
EXPERTS_CALLS = ("judge", "layout", "experts")

_listing = threading.RLock()
_listed: list[tuple[KernelProvider, ...]] = []
"""The kernel providers, once they are known."""
_registering = threading.RLock()
"""Held over pluggy's own work only: an import under it could wait for a thread that waits for it."""


_manager = pluggy.PluginManager("graftq")
_manager.add_hookspecs(hookspecs)


def plugin_manager() -> pluggy.PluginManager:
    """The one pluggy manager of this process."""
    return _manager


def register(group: str, name: str | None = None) -> None:
    """Import and register the entry points of ``group`` (only those called ``name``, if given), each once."""
    for entry in entry_points(group=group):
        label = f"{group}:{entry.value}"
        if (name is None or entry.name == name) and not _is_known(label):
            try:
                plugin = entry.load()
            except CONTAINED as error:
                failures.record(label, error)
            else:
                _register_once(label, plugin)


def _is_known(label: str) -> bool:
    with _registering:
        return label in failures.recorded or plugin_manager().has_plugin(label)


def _register_once(label: str, plugin: object) -> None:
    manager = plugin_manager()
    with _registering:
        if _is_known(label):  # by another thread
            return
        try:
            manager.register(plugin, name=label)
        except BaseException as error:
            if manager.has_plugin(label):  # pluggy keeps one whose hooks it has refused
                manager.unregister(name=label)
            if not isinstance(error, CONTAINED):
                raise
            failures.record(label, error)


def seams(root: str) -> dict[str, list[Callable[[ModuleType], None]]]:
    """Every function that wants to patch a module of the framework ``root``, by module name."""
    register(ADAPTERS, root)
    found: dict[str, list[Callable[[ModuleType], None]]] = {}
    for label, answer in _call_each("graftq_seams", root=root):
        try:
            patches = _patches(answer)
        except CONTAINED as error:
            failures.record(label, error)
        else:
            for module, patch in patches:
                found.setdefault(module, []).append(patch)
    return found


def _patches(answer: object) -> list[tuple[str, Callable[[ModuleType], None]]]:
    """What an adapter returned, checked.

    Raises:
        TypeError: for anything else than a mapping of module names to functions.
    """
    if not isinstance(answer, Mapping):
        raise TypeError(f"graftq_seams returned {type(answer).__name__}, not a mapping")
    patches = list(answer.items())
    if not all(isinstance(module, str) and callable(patch) for module, patch in patches):
        raise TypeError("graftq_seams returned something else than module names and functions")
    return patches


def kernel_providers() -> tuple[KernelProvider, ...]:
    """Every registered kernel provider; imports torch."""
    with _listing:  # listed once, by one thread, as no two lists may differ
        if not _listed:
            register(KERNELS)
            _listed.append(tuple(_checked()))
        return _listed[0]


def _checked() -> Iterator[KernelProvider]:
    """The providers that plugins return, without those that would fail later."""
    names: set[str] = set()
    answers = _call_each("graftq_kernels")
    for label, answer in sorted(answers, key=lambda one: not one[0].startswith(OWN)):  # a name is ours before others'
        try:
            found = list(answer)
        except CONTAINED as error:
            failures.record(label, error)
            continue
        for number, provider in enumerate(found, 1):
            try:
                _check(provider, names)
            except CONTAINED as error:
                failures.record(f"graftq_kernels: kernel {number} of {label}", error)
            else:
                names.add(provider.name)
                yield provider


def _check(provider: Any, names: Set[str]) -> None:
    """Raise for what would fail later, when a layer looks for its kernel.

    Raises:
        TypeError: for what is no provider, or one with members of another kind.
        ValueError: for a name that is empty, or another provider's.
    """
    missing = [member for member in ("name", "priority", *PROVIDER_CALLS) if not hasattr(provider, member)]
    if missing:
        raise TypeError(f"got {provider!r}, not a kernel provider: it has no {', '.join(missing)}")
    name, priority = provider.name, provider.priority
    if not isinstance(name, str):
        raise TypeError(f"{provider!r} has the name {name!r}, not a text")
    if not name:
        raise ValueError(f"{provider!r} has an empty name")
    if name in names:
        raise ValueError(f"a second kernel called {name!r}: {provider!r}")
    if not isinstance(priority, int):
        raise TypeError(f"kernel {name!r} has the priority {priority!r}, not an integer")
    experts = getattr(provider, "experts", None)
    sides = [(provider, PROVIDER_CALLS)] + ([] if experts is None else [(experts, EXPERTS_CALLS)])
    for side, calls in sides:
        for member in calls:
            found = getattr(side, member, None)
            if not callable(found):
                raise TypeError(f"kernel {name!r} has {found!r} for {member}, not a function")


def find_kernel(request: Request[Any]) -> Selection:
    """Select among all providers, obeying ``GRAFTQ_KERNEL``; without side effects.

    A kernel forced there that has none for a layer's experts still runs their projections, one by one.

    Raises:
        graftq.quant_linear.selection.NoKernelError: with every provider's reason.
    """
    from graftq.quant_linear.experts_spec import ExpertsSpec
    from graftq.quant_linear.selection import Accepted, select

    forced = _forced()
    if forced is not None and isinstance(request.spec, ExpertsSpec):
        verdicts = select(request, kernel_providers(), unusable=_unusable).verdicts
        forced = forced if isinstance(verdicts.get(forced), Accepted) else REFERENCE
    return select(request, kernel_providers(), forced, _unusable)


def choose_kernel(request: Request[Any]) -> Selection:
    """:func:`find_kernel` for a layer, or experts, about to run: the provider is prepared, a slow fallback reported.

    A provider that cannot be prepared is left out from then on.
    """
    from graftq.quant_linear.experts_spec import ExpertsSpec
    from graftq.quant_linear.selection import Accepted

    while not _prepare((selection := find_kernel(request)).provider):
        pass
    verdict = selection.verdicts[selection.provider.name]
    if isinstance(verdict, Accepted) and verdict.note and verdict.note not in _reported:
        _reported.add(verdict.note)
        logger.info("graftq: %s", verdict.note)
    if selection.provider.priority == 0:
        if isinstance(request.spec, ExpertsSpec):
            slow, asked_for = "experts on %s run one by one", _forced() == REFERENCE
        else:
            slow = "layers on %s run on the slow reference, which unpacks the weights at every call"
            asked_for = _forced() is not None
        if not asked_for:
            _report_slow(selection, request.device, slow)
    return selection


def _prepare(provider: KernelProvider) -> bool:
    """Prepare a provider, once; whether it can be used."""
    if provider.name not in _prepared:
        from graftq.quant_linear.selection import failure

        try:
            getattr(provider, "prepare", lambda: None)()
        except Exception as error:
            _unusable[provider.name] = failure(error)
            failures.record(f"kernel provider {provider.name}", error)
            return False
        _prepared.add(provider.name)
    return True


def _forced() -> str | None:
    return os.environ.get(switches.KERNEL) or None


def _report_slow(selection: Selection, device: str, what: str) -> None:
    """Say once for each reason that something runs slowly; a warning where there is an accelerator."""
    from graftq.quant_linear.selection import Rejected

    refusals = [(name, verdict) for name, verdict in selection.verdicts.items() if isinstance(verdict, Rejected)]
    reasons = "; ".join(f"{name}: {verdict.reason}" for name, verdict in refusals) or "there is no other kernel"
    said = f"{what % device} ({reasons})"
    if said in _reported:
        return
    _reported.add(said)
    remedies = ", or ".join(verdict.remedy for _, verdict in refusals if verdict.remedy)
    level = logging.INFO if device == "cpu" else logging.WARNING
    logger.log(level, "graftq: %s.%s", said, f" Remedy: {remedies}." if remedies else "")


def _call_each(hook: str, **arguments: object) -> list[tuple[str, Any]]:
    """Call one hook plugin by plugin, so that an exception in one costs only that one; without answers of None."""
    with _registering:
        implementations = getattr(plugin_manager().hook, hook).get_hookimpls()
    answers = []
    for implementation in implementations:
        label = implementation.plugin_name
        if label not in failures.recorded:
            try:
                answer = implementation.function(*(arguments[name] for name in implementation.argnames))
            except CONTAINED as error:
                failures.record(label, error)
            else:
                answers += [(label, answer)] if answer is not None else []
    return answers
