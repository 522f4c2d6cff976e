"""``text-generation-server quantize``, called as the server's command line does."""

from __future__ import annotations

import inspect
import json
import logging
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers.modeling_utils  # noqa: F401 - graftq takes over first
from support.models import logits, tiny
from support.processes import ROOT
from tgi.standins import installed
from transformers import AutoModelForCausalLM

from graftq.adapters.tgi import quantizing
from graftq.plugin.cli import main as command_line


@pytest.fixture
def plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A float model with a tokenizer, and WikiText-2 as the package ``datasets`` would give it."""
    tiny("mixtral", vocab_size=2048).save_pretrained(tmp_path / "float")
    for file in (ROOT / "examples" / "tiny-mixtral-gptq").glob("*token*"):
        shutil.copy(file, tmp_path / "float")
    wikitext: Any = ModuleType("datasets")
    wikitext.load_dataset = lambda *names, **options: [
        {"text": f"def number_{n}(x):\n    return x" * 9} for n in range(30)
    ]
    monkeypatch.setitem(sys.modules, "datasets", wikitext)
    return tmp_path / "float"


@pytest.fixture
def quantize(plain: Path) -> Iterator[Any]:
    with installed(plain) as server:
        yield server["text_generation_server.layers.gptq.quantize"].quantize


def arguments(plain: Path, **changes: Any) -> dict[str, Any]:
    given = {"model_id": str(plain), "bits": 4, "groupsize": 32, "output_dir": str(plain.parent / "out")}
    given |= {"revision": "main", "trust_remote_code": False, "upload_to_model_id": None, "percdamp": 0.03}
    return {**given, "act_order": True, **changes}


@pytest.mark.filterwarnings("ignore:.*calibration tokens for layers")
def test_makes_what_loads(quantize: Any, plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploaded: list[dict[str, Any]] = []
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", lambda self, **given: uploaded.append(given))
    quantize(**arguments(plain, upload_to_model_id="a/b"))
    stated = json.loads((plain.parent / "out" / "quantize_config.json").read_text())
    wanted = {"bits": 4, "group_size": 32, "damp_percent": 0.03, "desc_act": True, "sym": True}
    assert wanted.items() <= stated.items()
    assert uploaded == [{"folder_path": str(plain.parent / "out"), "repo_id": "a/b", "repo_type": "model"}]
    model = AutoModelForCausalLM.from_pretrained(plain.parent / "out", dtype=torch.float32)
    assert logits(model).isfinite().all()
    assert type(model.model.layers[0].mlp.experts).__name__ == "QuantExperts"


def test_the_call(quantize: Any, plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(command_line, "main", lambda call: calls.append(call) or 0)
    quantize(**arguments(plain, act_order=False, bits=3, groupsize=-1, revision=None))
    out = str(plain.parent / "out")
    expected = f"quantize {plain} {out} --bits 3 --group-size -1 --damp-percent 0.03"
    assert calls == [f"{expected} --dataset wikitext2 --seq-len 2048 --tokens 262144 --resume".split()]
    assert list(inspect.signature(quantize).parameters) == list(arguments(plain))


def test_what_goes_wrong(quantize: Any, plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="trust_remote_code: "):
        quantize(**arguments(plain, trust_remote_code=True))
    with pytest.raises(SystemExit):
        quantize(**arguments(plain, bits=5))
    assert "graftq: " in capsys.readouterr().err


def test_beside_older_transformers(quantize: Any, plain: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr(quantizing, "version", lambda name: "4.57.6")
    with caplog.at_level(logging.WARNING, "graftq"), pytest.raises(AssertionError, match="the server's own quantizer"):
        quantize(**arguments(plain))
    assert "4.57.6: the server's code runs" in caplog.text
