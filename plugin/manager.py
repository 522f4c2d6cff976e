"""Finds adapters and kernel providers, ours and third parties', and keeps a broken one from harming the rest."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from importlib.metadata import entry_points
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pluggy

from graftq.plugin import failures, hookspecs, switches
from graftq.plugin.failures import CONTAINED

if TYPE_CHECKING:
    from graftq.quant_linear.selection import (
        ExpertsProvider,
        ExpertsRequest,
        KernelProvider,
        P,
        Request,
        Selection,
    )

ADAPTERS = "graftq.adapters"
KERNELS = "graftq.kernels"
OWN = f"{KERNELS}:graftq."
logger = logging.getLogger("graftq")

_reported: set[str] = set()
"""Slow fallbacks that have been reported, with device and reasons."""

PROVIDER_CALLS = ("judge", "layout")

_listing = threading.RLock()
_listed: dict[str, tuple[Any, ...]] = {}
"""Kernel providers by hook."""
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
    return _providers("graftq_kernels", "linear")


def experts_providers() -> tuple[ExpertsProvider, ...]:
    """Every registered provider of kernels for experts; imports torch."""
    return _providers("graftq_experts_kernels", "experts")


def _providers(hook: str, does: str) -> tuple[Any, ...]:
    """The providers that ``hook`` returns, checked; listed once, by one thread, as no two lists may differ."""
    with _listing:
        if hook not in _listed:
            register(KERNELS)
            _listed[hook] = tuple(_checked(hook, (*PROVIDER_CALLS, does)))
        return _listed[hook]


def _checked(hook: str, calls: Sequence[str]) -> Iterator[Any]:
    names: set[str] = set()
    answers = _call_each(hook)
    for label, answer in sorted(answers, key=lambda one: not one[0].startswith(OWN)):  # a name is ours before others'
        try:
            found = list(answer)
        except CONTAINED as error:
            failures.record(label, error)
            continue
        for number, provider in enumerate(found, 1):
            try:
                _check(provider, calls, names)
            except CONTAINED as error:
                failures.record(f"{hook}: kernel {number} of {label}", error)
            else:
                names.add(provider.name)
                yield provider


def _check(provider: Any, calls: Sequence[str], names: Set[str]) -> None:
    """Raise for what would fail later, when a layer looks for its kernel.

    Raises:
        TypeError: for what is no provider, or one with members of another kind.
        ValueError: for a name that is empty, or another provider's.
    """
    missing = [member for member in ("name", "priority", *calls) if not hasattr(provider, member)]
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
    for member in calls:
        if not callable(getattr(provider, member)):
            raise TypeError(f"kernel {name!r} has {getattr(provider, member)!r} for {member}, not a function")


def find_kernel(request: Request) -> Selection[KernelProvider]:
    """Select among all providers, obeying ``GRAFTQ_KERNEL``.

    Raises:
        graftq.quant_linear.selection.NoKernelError: with every provider's reason.
    """
    from graftq.quant_linear.selection import select

    return select(request, kernel_providers(), _forced())


def choose_kernel(request: Request) -> Selection[KernelProvider]:
    """:func:`find_kernel` for a layer that is going to run: a slow fallback is reported."""
    selection = find_kernel(request)
    if selection.provider.priority == 0 and _forced() is None:
        _report_slow(
            selection, request.device, "layers on %s run on the slow reference, which unpacks the weights at every call"
        )
    return selection


def find_experts_kernel(request: ExpertsRequest) -> Selection[ExpertsProvider]:
    """Select among all providers of kernels for experts, obeying ``GRAFTQ_KERNEL``.

    A kernel forced there that has no form for these experts still runs their projections, one by one.
    """
    from graftq.quant_linear.selection import Accepted, select

    free, forced = select(request, experts_providers()), _forced()
    if forced is None:
        return free
    usable = isinstance(free.verdicts.get(forced), Accepted)
    return select(request, experts_providers(), forced if usable else "torch")


def choose_experts_kernel(request: ExpertsRequest) -> Selection[ExpertsProvider]:
    """:func:`find_experts_kernel` for a layer that is going to run: a slow fallback is reported."""
    selection = find_experts_kernel(request)
    if selection.provider.priority == 0 and _forced() != "torch":
        _report_slow(selection, request.device, "experts on %s run one by one")
    return selection


def _forced() -> str | None:
    return os.environ.get(switches.KERNEL) or None


def _report_slow(selection: Selection[P], device: str, what: str) -> None:
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
