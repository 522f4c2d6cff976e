"""graftq's entry points in other packages: importing this module imports nothing, and calling into it never raises.

torch, vLLM and SGLang load their entry points by name, and torch lets whatever that raises fail ``import torch``. A
file ``graftq.py`` in the working directory, or half an installation, must not come to that. So this package has a
top-level name that nobody else uses, and imports graftq in its functions only, once it knows whose ``graftq`` would be
imported.
"""

_said: set[str] = set()
"""Warnings given; vLLM and SGLang call in again after torch has."""


def autoload() -> None:
    """What ``import torch`` calls: put the import hook in place."""
    _call("graftq.plugin.bootstrap", "autoload")


def register_vllm() -> None:
    """What vLLM calls in each of its processes: register the method that takes GPTQ checkpoints over."""
    _call("graftq.adapters.vllm", "register")


def register_sglang() -> None:
    """What SGLang calls in each of its processes: the same, if the user has switched it on."""
    _call("graftq.adapters.sglang", "register")


def _call(module: str, function: str) -> None:
    try:
        import os

        if os.environ.get("GRAFTQ_DISABLE", "") not in ("", "0"):
            return
        obstacle = _obstacle()
        if obstacle is None:
            from importlib import import_module

            getattr(import_module(module), function)()
    except (Exception, SystemExit) as error:
        obstacle = f"{type(error).__name__}: {error}"
    if obstacle is not None and obstacle not in _said:
        _said.add(obstacle)
        from logging import getLogger

        getLogger("graftq").warning(
            "graftq could not start: %s. Nothing is taken over; GRAFTQ_DISABLE=1 silences this.", obstacle
        )


def _obstacle() -> "str | None":
    """What is in the way of importing graftq, without importing it: another module or folder of that name, or none."""
    import os
    from importlib.util import find_spec

    def home(file: str) -> str:
        return os.path.normcase(os.path.realpath(os.path.dirname(os.path.dirname(file))))

    try:
        spec = find_spec("graftq")
    except ValueError:  # somebody has put a module without a spec into sys.modules
        return "a module called graftq, which is not this package, has been imported before it"
    if spec is None:
        return f"the package graftq is missing beside {os.path.dirname(__file__)}: install graftq again"
    folders = list(spec.submodule_search_locations or ())
    if (
        folders and spec.origin and home(spec.origin) == home(__file__)
    ):  # this package and graftq are installed together
        return None
    found = spec.origin if spec.origin and spec.origin != "namespace" else ", ".join(folders) or "an unknown place"
    return (
        f"{found} hides the package graftq, which is installed in {home(__file__)}: "
        "rename it, or take its folder off sys.path"
    )
