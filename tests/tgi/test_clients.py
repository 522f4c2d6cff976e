"""The examples' clients, against a stand-in for the server's HTTP side."""

from __future__ import annotations

import importlib.util
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from support.processes import ROOT, run
from support.tgi import INTERPRETER

CLIENTS = {"text_generation": ("text_generation_client.py", 512), "huggingface_hub": ("inference_client.py", 128)}
CARD = {"do_sample": True, "temperature": 0.7, "top_p": 0.95, "top_k": 40, "repetition_penalty": 1.1}


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(asked)  # type: ignore[attr-defined]
        details = {"finish_reason": "length", "generated_tokens": 1, "prefill": [], "tokens": []}
        body = json.dumps([{"generated_text": "Once upon a llama", "details": details}]).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing; the requests are recorded."""


@pytest.fixture
def server() -> Iterator[HTTPServer]:
    made = HTTPServer(("127.0.0.1", 0), Handler)
    made.asked = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    try:
        yield made
    finally:
        made.shutdown()
        made.server_close()
        thread.join()


@pytest.mark.parametrize("package", CLIENTS)
def test_client(package: str, server: Any) -> None:
    # `text-generation` cannot be installed beside transformers 5, but can be where the server is.
    python = sys.executable if importlib.util.find_spec(package) else INTERPRETER
    if not python:
        pytest.skip(f"{package} is not installed here, and GRAFTQ_TEST_TGI names no other interpreter")
    script, max_new_tokens = CLIENTS[package]
    url = f"http://127.0.0.1:{server.server_port}"
    done = run(str(ROOT / "examples" / "tgi" / script), url, python=python, GRAFTQ_DISABLE="1", HF_HUB_OFFLINE="0")
    assert "Model output: Once upon a llama" in done.stdout
    (asked,) = server.asked
    assert asked["inputs"].startswith("[INST] ")
    expected = {**CARD, "max_new_tokens": max_new_tokens}
    assert {name: asked["parameters"][name] for name in expected} == expected
