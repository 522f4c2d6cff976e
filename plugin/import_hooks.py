"""Runs adapters' patches at the moment a framework's module has finished importing.

Kept cheap, because every import of the process passes here: the entry points are listed at the first
import of something that is neither standard library nor torch, an adapter is imported when its framework
is, and only the modules that an adapter names are ever looked up twice.
"""

from __future__ import annotations

import importlib
import logging
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

from graftq.plugin import failures, patching, switches

logger = logging.getLogger("graftq")

Patch = Callable[[ModuleType], None]

# Roots that tell nothing about which framework is coming.
_UNINTERESTING = frozenset(sys.stdlib_module_names) | {"torch", "graftq", "pluggy"}


class Finder:
    """A finder that finds nothing itself: it asks the others, and attaches patches to what they find.

    Attributes:
        roots: Top-level modules that some adapter waits for; None until the entry points were listed.
        waiting: Patches by module name, for modules not yet (fully) imported.
        taken: Modules patched so far, by root.
    """

    def __init__(self) -> None:
        self.roots: set[str] | None = None
        self.waiting: dict[str, list[Patch]] = {}
        self.taken: dict[str, list[str]] = {}
        self._announced: set[str] = set()
        self._busy = threading.local()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Called for every import; returns a spec only for modules that patches wait for."""
        if getattr(self._busy, "here", False):
            return None
        self._busy.here = True
        try:
            self._meet(name.partition(".")[0])
            self._catch_up()
            return self._attach(name, path, target) if name in self.waiting else None
        except Exception as error:
            failures.record(f"the import hook at {name}", error)
            return None
        finally:
            self._busy.here = False

    def _meet(self, root: str) -> None:
        if root in _UNINTERESTING:
            return
        if self.roots is None:
            from importlib.metadata import entry_points

            self.roots = {entry.name for entry in entry_points(group="graftq.adapters")}
            for already in self.roots & sys.modules.keys():
                self.open(already)
        if root in self.roots:
            self.open(root)

    def open(self, root: str) -> None:
        """Ask the adapters of ``root`` for their seams, once, and patch what is already imported."""
        if root in self.taken:
            return
        self.taken[root] = []
        from graftq.plugin import manager

        self.waiting.update(manager.seams(root))
        self._catch_up()

    def _catch_up(self) -> None:
        """Patch modules that were already being imported when the hook came."""
        for name in list(self.waiting):
            module = sys.modules.get(name)
            if module is not None and not getattr(module.__spec__, "_initializing", False):
                self._run(module)

    def _attach(self, name: str, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec = None if finder is self or find is None else find(name, path, target)
            if spec is not None:
                break
        else:
            return None
        loader = spec.loader
        if loader is not None and hasattr(loader, "exec_module"):
            execute = loader.exec_module

            # On the instance, so that the loader keeps its type for inspect, importlib.resources and others.
            def exec_module(module: ModuleType) -> None:
                execute(module)
                if module.__name__ == name:
                    self._run(module)

            loader.exec_module = exec_module
        return spec

    def _run(self, module: ModuleType) -> None:
        name = module.__name__
        done = [self._patch(module, patch) for patch in self.waiting.pop(name, ())]
        if any(done):
            root = name.partition(".")[0]
            self.taken.setdefault(root, []).append(name)
            if not any(other.partition(".")[0] == root for other in self.waiting):
                self.announce(root)

    def _patch(self, module: ModuleType, patch: Patch) -> bool:
        try:
            with patching.all_or_none():
                patch(module)
        except Exception as error:
            by = getattr(patch, "__module__", "an adapter")
            failures.record(f"taking over {module.__name__} by {by}", error)
            return False
        return True

    def announce(self, root: str) -> None:
        """Say once what was taken over; also for an adapter that knows that nothing more is coming."""
        if root in self._announced or not self.taken.get(root):
            return
        self._announced.add(root)
        from importlib.metadata import PackageNotFoundError, version

        try:  # the metadata's: the module may not be so far yet, and its __getattr__ may import, or raise, anything
            found = version(root)
        except PackageNotFoundError:
            found = "of unknown version"
        places = ", ".join(sorted(self.taken[root]))
        logger.info(
            "graftq took over GPTQ loading in %s %s (%s); %s=1 switches it off", root, found, places, switches.DISABLE
        )


def finder() -> Finder | None:
    """The installed finder, if there is one."""
    return next((entry for entry in sys.meta_path if isinstance(entry, Finder)), None)


def install() -> Finder:
    """Put the finder first on ``sys.meta_path``, once per process."""
    found = finder()
    if found is None:
        found = Finder()
        sys.meta_path.insert(0, found)
    return found


def require(*modules: str) -> None:
    """Import modules of a framework, and make sure that they are taken over.

    For adapters whose own functions load through that framework.

    Raises:
        RuntimeError: if they are not, with the reason.
    """
    if switches.disabled():
        raise RuntimeError(f"{switches.DISABLE} is set, which switches graftq off")
    found = install()
    for name in modules:
        importlib.import_module(name)
        root = name.partition(".")[0]
        found.open(root)
        if name not in found.taken[root]:
            why = "; ".join(f"{what}: {reason}" for what, reason in failures.recorded.items())
            raise RuntimeError(f"graftq could not take over {name} ({why or 'no adapter knows it'})")


def uninstall() -> None:
    """Take the finder away and undo every patch."""
    found = finder()
    if found is not None:
        sys.meta_path.remove(found)
    patching.undo_all()
