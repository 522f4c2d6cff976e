"""The hooks that adapters and kernel providers implement (pluggy project name: ``graftq``).

A plugin is a module named in one of two entry point groups:

``graftq.adapters``
    The entry's name is the top-level module whose import calls for the adapter. The module
    implements :func:`graftq_seams` and is imported only when that framework is.
``graftq.kernels``
    The module implements :func:`graftq_kernels`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from graftq.quant_linear.selection import KernelProvider

hookspec = pluggy.HookspecMarker("graftq")
hookimpl = pluggy.HookimplMarker("graftq")


@hookspec
def graftq_seams(root: str) -> Mapping[str, Callable[[ModuleType], None]] | None:
    """Name the modules to patch, each with the function that patches it.

    Args:
        root: The top-level module being imported, or looked for, in which case it may not be installed. An adapter
            for another one, or that has nothing to patch, returns None.

    Returns:
        Fully qualified module name to a function that gets the module once it is fully imported.
        The function must be idempotent. What it raises is recorded, never passed on to the host, and undoes what the
        function has replaced by :mod:`graftq.plugin.patching`.
    """


@hookspec
def graftq_kernels() -> Iterable[KernelProvider]:  # type: ignore[empty-body]
    """Return kernel providers (:class:`graftq.quant_linear.selection.KernelProvider`)."""
