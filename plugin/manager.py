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
logger = logging.getLogger("graftq")

_reported: set[str] = set()
"""Slow fallbacks that have been reported, with device and reasons."""

PROVIDER_MEMBERS = ("name", "priority", "judge", "layout")


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
    return tuple(_providers("graftq_kernels", "linear"))


@lru_cache(maxsize=1)
def experts_providers() -> tuple[ExpertsProvider, ...]:
    """Every registered provider of kernels for experts; imports torch."""
    return tuple(_providers("graftq_experts_kernels", "experts"))


def _providers(hook: str, does: str) -> list[Any]:
    register(KERNELS)
    found: list[Any] = []
    for label, answer in _call_each(hook):
        try:
            providers = list(answer)
        except Exception as error:
            failures.record(label, error)
            continue
        for provider in providers:
            if all(hasattr(provider, member) for member in (*PROVIDER_MEMBERS, does)):
                found.append(provider)
            else:
                failures.record(label, TypeError(f"{hook} returned {provider!r}, not a kernel provider"))
    return found


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
