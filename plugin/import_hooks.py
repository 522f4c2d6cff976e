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
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from graftq.plugin import failures, patching, switches
from graftq.plugin.failures import CONTAINED
from graftq.plugin.loaders import PatchingLoader, attributes, being_imported, is_lazy

logger = logging.getLogger("graftq")

Patch = Callable[[ModuleType], None]

# Roots that tell nothing about which framework is coming.
_UNINTERESTING = frozenset(sys.stdlib_module_names) | {"torch", "graftq", "pluggy"}


class Finder:
    """A finder that finds nothing itself: it asks the others, and has patches run on the modules that they find.

    The patches of a module stay, because it can be imported again (after it was taken out of ``sys.modules``) or
    reloaded, and then needs them again.

    Attributes:
        roots: Top-level modules that some adapter waits for; None until the entry points were listed.
        patches: By module name, whether or not that is imported.
        taken: Names of the modules patched so far, by root.
    """

    def __init__(self) -> None:
        self.roots: set[str] | None = None
        self.patches: dict[str, list[Patch]] = {}
        self.taken: dict[str, list[str]] = {}
        self._patched: dict[str, Callable[[], object]] = {}  # weak references, so that a purged module can go
        self._failed: set[str] = set()
        self._claimed: set[str] = set()
        self._opened: set[str] = set()
        self._announced: set[str] = set()
        self._busy = threading.local()
        self._lock = threading.Lock()  # held over nothing that can import, since imports have locks of their own

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Called for every import; returns a spec only for modules that patches wait for."""
        if getattr(self._busy, "here", False):
            return None
        self._busy.here = True
        try:
            self._meet(_root(name))
            self._catch_up()
            return self._attach(name, path, target) if name in self.patches else None
        except CONTAINED as error:
            failures.record(f"the import hook at {name}", error)
            return None
        finally:
            self._busy.here = False

    def _meet(self, root: str) -> None:
        if root in _UNINTERESTING:
            return
        if self.roots is None:
            from importlib.metadata import entry_points

            roots = {entry.name for entry in entry_points(group="graftq.adapters")}
            for already in roots & sys.modules.keys():
                self.open(already)
            self.roots = roots
        if root in self.roots:
            self.open(root)

    def open(self, root: str) -> None:
        """Ask the adapters of ``root`` for their seams, once, and patch what is already imported."""
        if root in self._opened:
            return
        from graftq.plugin import manager

        before, self._busy.here = getattr(self._busy, "here", False), True  # adapters are no framework's modules
        try:
            seams = manager.seams(root)
        finally:
            self._busy.here = before
        with self._lock:
            if root not in self._opened:  # another thread may have been faster
                self._opened.add(root)
                for name, patches in seams.items():
                    self.patches.setdefault(name, []).extend(patches)
                    self._patched.pop(name, None)
        self._catch_up()

    def in_place(self, name: str) -> bool:
        """Whether the module that ``name`` stands for now has been patched, by every patch of graftq's own."""
        return name in sys.modules and self._is_patched(name, sys.modules[name]) and name not in self._failed

    def _catch_up(self) -> None:
        """Patch modules that were imported without this finder, or were being imported when it came."""
        while any(self._patch_late(name) for name in tuple(self.patches)):
            pass  # these patches may have imported others

    def _patch_late(self, name: str) -> bool:
        module = sys.modules.get(name)
        if module is None or name in self._claimed or self._is_patched(name, module):
            return False
        spec = attributes(module).get("__spec__")
        if getattr(spec, "_initializing", False) or isinstance(getattr(spec, "loader", None), PatchingLoader):
            return False
        if spec is not None and is_lazy(module):
            self._wrap(name, spec)
            return False
        with self._claim(name) as free:
            if free:
                self._run(name, module)
        return free

    def _is_patched(self, name: str, module: object) -> bool:
        patched = self._patched.get(name)
        return patched is not None and patched() is module

    @contextmanager
    def _claim(self, name: str) -> Iterator[bool]:
        """Whether nothing else, up the stack or in another thread, is about to patch this module."""
        with self._lock:
            free = name not in self._claimed
            self._claimed.add(name)
        try:
            yield free
        finally:
            if free:
                self._claimed.discard(name)

    def _attach(self, name: str, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
        for finder in tuple(sys.meta_path):
            find = getattr(finder, "find_spec", None)
            spec = None if finder is self or find is None else find(name, path, target)
            if spec is not None:
                self._wrap(name, spec)
                return spec
        return None

    def _wrap(self, name: str, spec: ModuleSpec) -> None:
        if hasattr(spec.loader, "exec_module") and not isinstance(spec.loader, PatchingLoader):
            loader: Any = PatchingLoader(spec.loader, lambda module, stock: self._execute(name, module, stock))
            spec.loader = loader

    def _execute(self, name: str, module: ModuleType, loader: Any) -> None:
        """Execute a module by its own loader, for the first time or again, and patch it."""
        with self._claim(name):
            lazy_before = is_lazy(module)  # then it is loaded now; some versions of Python change its class later
            try:
                loader.exec_module(module)
                if is_lazy(module) and not lazy_before:
                    self._wrap(name, attributes(module)["__spec__"])
                else:
                    self._run(name, module)
            except BaseException:
                self._patched.pop(name, None)  # a reload that failed half way leaves something unpatched
                raise

    def _run(self, name: str, module: ModuleType) -> None:
        patches = self.patches.get(name, [])
        forgotten = self._renew_adapters(name, module)
        failed = [patch for patch in patches if not self._patch(name, module, patch)]
        for other, half_done in forgotten.items():  # who imports it looks for it at the end
            sys.modules.setdefault(other, half_done)
        ours_failed = any(_origin(patch).startswith("graftq.") for patch in failed)
        if ours_failed or len(failed) == len(patches):
            self._failed.add(name)
        else:
            self._failed.discard(name)
        try:
            self._patched[name] = weakref.ref(module)
        except TypeError:  # a program may put any object into sys.modules
            self._patched[name] = lambda: module
        if len(failed) < len(patches):
            root = _root(name)
            taken = self.taken.setdefault(root, [])
            if name not in taken:
                taken.append(name)
            if all(other in self._patched for other in self.patches if _root(other) == root):
                self.announce(root)

    def _renew_adapters(self, name: str, module: ModuleType) -> dict[str, ModuleType]:
        """Forget those of our adapters' modules that patches cannot use, so that they are imported anew.

        They refer to the framework's classes, which are others once it was imported anew: none of the modules that
        were patched is there any more. (The top-level module tells nothing: transformers puts another one in its place
        when its processors are imported.) And of those that patch this module, some are half done, if their own import
        is what came to it.

        Returns:
            Those that are half done, by name: what no patch has imported anew goes back to its place.
        """
        root = _root(name)
        patched = [other for other in self._patched if _root(other) == root]
        now = {**sys.modules, name: module}
        is_new = not any(self._is_patched(other, now[other]) for other in patched if other in now)
        for other in patched if is_new else ():
            del self._patched[other]
        half_done, own = being_imported(), {_origin(patch) for patch in self.patches.get(name, [])}
        patches = [patch for other, found in self.patches.items() if _root(other) == root for patch in found]
        forgotten = {}
        for adapter in {_origin(patch) for patch in patches if _origin(patch).startswith("graftq.adapters.")}:
            for other in [other for other in sys.modules if other.startswith(f"{adapter}.")]:
                if (patched and is_new) or (adapter in own and other in half_done):
                    old = sys.modules.pop(other)
                    if other in half_done:
                        forgotten[other] = old
                    vars(sys.modules[adapter]).pop(other.removeprefix(f"{adapter}."), None)
        return forgotten

    def _patch(self, name: str, module: ModuleType, patch: Patch) -> bool:
        try:
            with patching.all_or_none():
                patch(module)
        except CONTAINED as error:
            failures.record(f"taking over {name} by {_origin(patch)}", error)
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


def _root(name: str) -> str:
    return name.partition(".")[0]


def _origin(patch: Patch) -> str:
    return str(getattr(patch, "__module__", None) or "an adapter")


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
        found.open(_root(name))
        if not found.in_place(name):
            why = "; ".join(f"{what}: {reason}" for what, reason in failures.recorded.items())
            raise RuntimeError(f"graftq could not take over {name} ({why or 'no adapter knows it'})")


def check() -> None:
    """Record as a failure what should have been taken over by now and is not, for ``graftq doctor``."""
    found = finder()
    if found is not None:
        for name in found.patches:
            known = any(what.startswith(f"taking over {name} by ") for what in failures.recorded)
            if name in sys.modules and not found.in_place(name) and not known:
                failures.record(f"taking over {name}", RuntimeError("it was imported, and is not taken over"))
    for place in patching.overwritten():
        failures.record(f"keeping {place}", RuntimeError(f"somebody has replaced graftq's function there ({place})"))


def uninstall() -> None:
    """Take the finder away and undo every patch."""
    found = finder()
    if found is not None:
        sys.meta_path.remove(found)
        found.patches.clear()  # for modules that were found, and not yet executed
    patching.undo_all()
