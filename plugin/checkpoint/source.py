"""Where a checkpoint comes from: a folder or a repository of the Hub, asked for files by name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


@dataclass(frozen=True)
class Source:
    """A folder or repository, with the arguments that a framework's loader was given for it.

    Where the Hub cannot be asked (offline, gated, no such repository), what the cache holds is all there
    is; the framework's own requests come before ours, and say what is wrong.

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

    def full_name(self, filename: str) -> str:
        """The file's path inside the repository."""
        return f"{self.hub['subfolder']}/{filename}" if self.hub.get("subfolder") else filename

    def fetch(self, filename: str) -> str | None:
        """Path of a file on this machine, downloaded if need be; None if there is no such file."""
        if self.is_local:
            path = Path(self.name, self.hub.get("subfolder") or "", filename)
            return str(path) if path.is_file() else None
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

        try:
            return hf_hub_download(self.name, filename, **self.hub)
        except (EntryNotFoundError, HfHubHTTPError, HFValidationError):
            return self.cached(filename)

    def has(self, filename: str) -> bool:
        """Whether there is such a file; asks the Hub for its head only."""
        if self.is_local:
            return self.fetch(filename) is not None
        if self.hub.get("local_files_only"):
            return self.cached(filename) is not None
        from huggingface_hub import HfApi

        arguments = {key: self.hub[key] for key in ("revision", "token") if key in self.hub}
        try:
            return HfApi().file_exists(self.name, self.full_name(filename), **arguments)
        except Exception:  # whatever the client's transport raises: the Hub cannot be asked
            return self.cached(filename) is not None

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
        inside = (name.removeprefix(prefix) for name in listed if name.startswith(prefix))
        return sorted(name for name in inside if "/" not in name)

    def cached(self, filename: str) -> str | None:
        """Path of a file that is already on this machine; None if it is not."""
        if self.is_local:
            return self.fetch(filename)
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        arguments = {key: self.hub[key] for key in ("revision", "cache_dir") if key in self.hub}
        try:
            path = try_to_load_from_cache(self.name, self.full_name(filename), **arguments)
        except HFValidationError:  # neither a folder nor a possible repository
            return None
        return path if isinstance(path, str) else None
