"""A small server that speaks the Hub's routes, for the real client: one repository with several branches.

Routes as huggingface_hub 1 and 2 ask for them: ``/{repo}/resolve/{revision}/{file}`` with ranges, and
``/api/models/{repo}`` with ``/revision/{revision}`` and ``/tree/{revision}``.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Hub:
    """A running server.

    Attributes:
        repo: The repository's id.
        branches: Folder by branch.
        endpoint: What ``HF_ENDPOINT`` is to be.
        requests: "METHOD path" of every request, with the number of bytes sent in answer.
    """

    repo: str
    branches: Mapping[str, Path]
    endpoint: str = ""
    requests: list[tuple[str, int]] = field(default_factory=list)

    def commit(self, branch: str) -> str:
        """The commit that a branch stands at."""
        return hashlib.sha1(branch.encode()).hexdigest()

    def folder(self, revision: str) -> Path | None:
        """The files of a branch or commit."""
        return next((path for name, path in self.branches.items() if revision in (name, self.commit(name))), None)

    def sent(self, ending: str) -> int:
        """Bytes sent of files whose name ends so."""
        return sum(size for request, size in self.requests if request.startswith("GET") and request.endswith(ending))


@contextmanager
def serve(repo: str, branches: Mapping[str, Path]) -> Iterator[Hub]:
    """Serve ``branches`` (each a folder) as ``repo`` until the block is left."""
    hub = Hub(repo, branches)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._route()

    def do_GET(self) -> None:
        self._route()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing; the requests are recorded."""

    def _route(self) -> None:
        path = unquote(urlsplit(self.path).path)
        repo = re.escape(self.hub.repo)
        if found := re.fullmatch(rf"/{repo}/resolve/([^/]+)/(.+)", path):
            self._file(*found.groups())
        elif found := re.fullmatch(rf"/api/models/{repo}(?:/(revision|tree)/([^/]+))?", path):
            self._api(found[1] or "revision", found[2] or "main")
        else:
            self._refuse("RepoNotFound", 404)

    def _file(self, revision: str, name: str) -> None:
        folder = self.hub.folder(revision)
        if folder is None:
            return self._refuse("RevisionNotFound", 404)
        commit = next(self.hub.commit(branch) for branch, path in self.hub.branches.items() if path == folder)
        if not (folder / name).is_file():
            return self._refuse("EntryNotFound", 404, commit)
        body = (folder / name).read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return self._send(200, body, headers)
        begin, end = int(wanted[1]), min(int(wanted[2] or len(body)), len(body) - 1)
        headers["Content-Range"] = f"bytes {begin}-{end}/{len(body)}"
        return self._send(206, body[begin : end + 1], headers)

    def _api(self, kind: str, revision: str) -> None:
        folder = self.hub.folder(revision)
        if folder is None:
            return self._refuse("RevisionNotFound", 404)
        files = sorted(path for path in folder.iterdir() if path.is_file())
        if kind == "tree":
            answer: object = [
                {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": "0" * 40} for path in files
            ]
        else:
            siblings = [{"rfilename": path.name} for path in files]
            answer = {"id": self.hub.repo, "sha": self.hub.commit(revision), "siblings": siblings, "tags": []}
        return self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _refuse(self, code: str, status: int, commit: str = "") -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": code, **({"X-Repo-Commit": commit} if commit else {})}
        self._send(status, b"", headers)

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        sent = 0 if self.command == "HEAD" else len(body)
        if sent:
            self.wfile.write(body)
        self.hub.requests.append((f"{self.command} {urlsplit(self.path).path}", sent))
