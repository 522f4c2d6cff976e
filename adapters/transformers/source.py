"""Where a checkpoint comes from: a folder or a repository of the Hub, asked for files by name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HUB_ARGUMENTS = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")


@dataclass(frozen=True)
class Source:
    """A folder or repository, with the arguments that ``from_pretrained`` was given for it.

    Attributes:
        name: Folder path or repository id.
        hub: The arguments named in ``HUB_ARGUMENTS``, as far as they were given.
    """

    name: str
    hub: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_local(self) -> bool:
        """Whether it is a folder."""
        return os.path.isdir(self.name)

    def describe(self, filename: str) -> str:
        """How messages call one of its files."""
        revision = "" if self.is_local or not self.hub.get("revision") else f"@{self.hub['revision']}"
        return str(Path(self.name + revision, self.hub.get("subfolder") or "", filename))

    def fetch(self, filename: str) -> str | None:
        """Path of a file on this machine, downloaded if need be; None if there is no such file."""
        if self.is_local:
            path = Path(self.name, self.hub.get("subfolder") or "", filename)
            return str(path) if path.is_file() else None
        from transformers.utils.hub import cached_file

        return cached_file(
            self.name,
            filename,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **self.hub,
        )

    def has(self, filename: str) -> bool:
        """Whether there is such a file; asks the Hub for its head only."""
        if self.is_local:
            return self.fetch(filename) is not None
        from transformers.utils.hub import has_file

        arguments = {key: self.hub[key] for key in ("revision", "proxies", "token", "cache_dir") if key in self.hub}
        full = f"{self.hub['subfolder']}/{filename}" if self.hub.get("subfolder") else filename
        return has_file(self.name, full, local_files_only=bool(self.hub.get("local_files_only")), **arguments)

    def names(self) -> list[str]:
        """All file names at its top level; empty where the Hub cannot be asked."""
        folder = self.hub.get("subfolder") or ""
        if self.is_local:
            return sorted(entry.name for entry in Path(self.name, folder).iterdir() if entry.is_file())
        from huggingface_hub import list_repo_files

        try:
            listed = list_repo_files(self.name, revision=self.hub.get("revision"), token=self.hub.get("token"))
        except Exception:  # offline, or a mirror without the listing: the names that were tried are all there is
            return []
        prefix = f"{folder}/" if folder else ""
        return sorted(name[len(prefix) :] for name in listed if name.startswith(prefix) and "/" not in name[len(prefix) :])
