"""Finds adapters and kernel providers, ours and third parties', and keeps a broken one from harming the rest."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib.metadata import entry_points
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pluggy

from graftq.plugin import failures, hookspecs, switches

if TYPE_CHECKING:
    from graftq.quant_linear.selection import KernelProvider, Rejected, Request, Selection

ADAPTERS = "graftq.adapters"
KERNELS = "graftq.kernels"
logger = logging.getLogger("graftq")

_reported: set[str] = set()
"""Slow fallbacks that have been reported, with device and reasons."""

_prepared: set[str] = set()
"""Providers that are ready to run, by name."""

_unusable: dict[str, Rejected] = {}
"""Providers whose preparation has failed, by name."""

REFERENCE = "torch"
PROVIDER_MEMBERS = ("name", "priority", "judge", "layout", "linear")


@lru_cache(maxsize=1)
def plugin_manager() -> pluggy.PluginManager:
    """The one pluggy manager of this process."""
    manager = pluggy.PluginManager("graftq")
    manager.add_hookspecs(hookspecs)
    return manager


def register(group: str, name: str | None = None) -> None:
    """Import and register the entry points of ``group`` (only those called ``name``, if given), each once."""
    manager = plugin_manager()
    for entry in entry_points(group=group):
        label = f"{group}:{entry.value}"
        if (name is None or entry.name == name) and not manager.has_plugin(label) and label not in failures.recorded:
            try:
                manager.register(entry.load(), name=label)
            except Exception as error:
                failures.record(label, error)


def seams(root: str) -> dict[str, list[Callable[[ModuleType], None]]]:
    """Every function that wants to patch a module of the framework ``root``, by module name."""
    register(ADAPTERS, root)
    found: dict[str, list[Callable[[ModuleType], None]]] = {}
    for label, answer in _call_each("graftq_seams", root=root):
        if not isinstance(answer, Mapping):
            failures.record(label, TypeError(f"graftq_seams returned {type(answer).__name__}, not a mapping"))
        elif not all(isinstance(module, str) and callable(patch) for module, patch in answer.items()):
            failures.record(label, TypeError("graftq_seams returned something else than module names and functions"))
        else:
            for module, patch in answer.items():
                found.setdefault(module, []).append(patch)
    return found


@lru_cache(maxsize=1)
def kernel_providers() -> tuple[KernelProvider, ...]:
    """Every registered kernel provider; imports torch."""
    register(KERNELS)
    found: list[Any] = []
    for label, answer in _call_each("graftq_kernels"):
        try:
            providers = list(answer)
        except Exception as error:
            failures.record(label, error)
            continue
        for provider in providers:
            if all(hasattr(provider, member) for member in PROVIDER_MEMBERS):
                found.append(provider)
            else:
                failures.record(label, TypeError(f"graftq_kernels returned {provider!r}, not a kernel provider"))
    return tuple(found)


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

    while not _prepare((selection := find_kernel(request)).provider):
        pass
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
    """Call one hook plugin by plugin, so that an exception in one costs only that one."""
    manager = plugin_manager()
    answers = []
    for label, plugin in manager.list_name_plugin():
        if label in failures.recorded:  # pluggy keeps a plugin whose registration has failed
            continue
        others = [other for other in manager.get_plugins() if other is not plugin]
        try:
            results = manager.subset_hook_caller(hook, others)(**arguments)
        except Exception as error:
            failures.record(label, error)
        else:
            answers += [(label, result) for result in results]
    return answers
