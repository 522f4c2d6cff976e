"""What ``import torch`` comes to: it puts the import hook in place, and leaves the rest until a framework is imported.

Called through the entry point in ``plugin/autoload``, which lets no exception out.
"""

from __future__ import annotations

from graftq.plugin import switches


def autoload() -> None:
    """Put the import hook in place, unless the user has switched graftq off; called any number of times."""
    if not switches.disabled():
        from graftq.plugin import import_hooks

        import_hooks.install()
