"""``graftq quantize``: from disk to disk, killed anywhere, and the same as in memory."""

from __future__ import annotations

import hashlib
import json
import math
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.models import logits, tiny
from support.processes import ROOT
from transformers import AutoModelForCausalLM

from graftq.adapters.transformers.making import engine, store, streaming
from graftq.adapters.transformers.making.blocks import Call
from graftq.adapters.transformers.making.calibration import token_rows
from graftq.adapters.transformers.making.command import texts
from graftq.adapters.transformers.making.door import make
from graftq.adapters.transformers.making.options import Options
from graftq.adapters.transformers.making.progress import bar
from graftq.adapters.transformers.making.streaming import quantize_checkpoint
from graftq.plugin.cli.main import main
from graftq.quant_linear.linear import QuantLinear

OPTIONS = Options(bits=4, group_size=32)
ROWS = token_rows(torch.randint(3, 96, (12, 24), generator=torch.Generator().manual_seed(5)))


def float_model(folder: Path, name: str = "mixtral", blocks: int = 2, **saving: Any) -> Path:
    tiny(name, num_hidden_layers=blocks).save_pretrained(folder / "float", **saving)
    return folder / "float"


def quantize(source: Path, out: Path, options: Options = OPTIONS, **more: Any) -> Path:
    quantize_checkpoint(source, out, ROWS, options, dtype=torch.float32, device=torch.device("cpu"), **more)
    return out


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3", "gpt2", "gemma", "mixtral", "qwen3_moe", "gpt_oss"])
def test_the_same_as_in_memory(name: str, tmp_path: Path):
    source = float_model(tmp_path, name, max_shard_size="50KB")
    made = AutoModelForCausalLM.from_pretrained(quantize(source, tmp_path / "out"), dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    make(model, ROWS, None, OPTIONS)
    assert torch.equal(logits(made), logits(model))
    model.save_pretrained(tmp_path / "memory")
    expected = load_file(tmp_path / "memory" / "model.safetensors")
    found = {key: value for path in (tmp_path / "out").glob("*.safetensors") for key, value in load_file(path).items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)
    parameters = json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert parameters == json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert len((tmp_path / "out" / "quantize_report.csv").read_text().splitlines()) > 4
    assert not (tmp_path / "out" / ".graftq").exists()


def test_hidden_states_are_written_when_that_is_worth_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Once the work since the last time took ten times what writing took; all blocks take five seconds here."""
    now, written = [0.0], []
    monkeypatch.setattr(store.time, "monotonic", lambda: now[0])
    unfinished = store.Store(tmp_path / "out", {}, resume=False)

    def streams(cost: float) -> dict[str, torch.Tensor]:
        now[0] += cost
        written.append(unfinished._done)
        return {"made.0": torch.zeros(1)}

    for cost in (1.0, 3.0, 8.0, 8.0):
        for _ in range(12):
            now[0] += 5
            unfinished.block_done(lambda cost=cost: streams(cost))
    assert written == [1, 3, 5, 7, 9, 11, 13, 19, 25, 41]


class Killed(BaseException):
    pass


def test_a_head_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source, options = float_model(tmp_path, "llama"), Options(bits=4, group_size=32, lm_head=True)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(streaming, "_finish", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            quantize(source, out, options)
    quantize(source, out, options, resume=True)
    made = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    make(model, ROWS, None, options)
    assert isinstance(made.lm_head, QuantLinear)
    assert torch.equal(logits(made), logits(model))
    assert made.generate(torch.tensor([[1, 5]]), max_new_tokens=3).shape[1] > 2
    assert json.loads((out / "quantize_config.json").read_text())["lm_head"] is True
    assert (out / "quantize_report.csv").read_text().splitlines()[-1].startswith("lm_head,288,")


def test_a_tied_head_is_refused_first(tmp_path: Path):
    tied = float_model(tmp_path, "gemma")
    with pytest.raises(ValueError, match="lm_head: the output embedding is tied"):
        quantize(tied, tmp_path / "out", Options(bits=4, group_size=32, lm_head=True))
    assert not (tmp_path / "out").exists()


REMEMBERED = {"all blocks remembered": (0, 2, 10), "only the first of three": (10**9, 3, 9)}


@pytest.mark.parametrize(("worth", "blocks", "least"), REMEMBERED.values(), ids=REMEMBERED)
def test_stopped_before_every_file(
    worth: int, blocks: int, least: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source = float_model(tmp_path, "llama", blocks)
    options = Options(bits=4, group_size=32, effort="autogptq")
    settle, written = store._settle, [0, 0]

    def stopping(aside: Path, path: Path) -> None:
        written[0] += 1
        if written[0] == written[1]:
            raise Killed
        settle(aside, path)

    monkeypatch.setattr(store, "_settle", stopping)
    monkeypatch.setattr(store, "WORTH", worth)
    whole = digests(quantize(source, tmp_path / "whole", options))
    files = written[0]
    assert files > least
    for number in range(1, files + 1):
        out = tmp_path / f"stopped-{number}"
        written[:] = [0, number]
        with pytest.raises(Killed):
            quantize(source, out, options)
        assert not (out / "model.safetensors.index.json").exists()
        written[:] = [0, 0]
        assert digests(quantize(source, out, options, resume=True)) == whole


SCRIPT = """
import os, signal, sys, torch, transformers.modeling_utils
from pathlib import Path
from graftq.adapters.transformers.making import streaming
from graftq.adapters.transformers.making.calibration import token_rows
from graftq.adapters.transformers.making.options import Options

def step(text, share):
    if text == sys.argv[3]:
        os.kill(os.getpid(), signal.SIGKILL)

rows = token_rows(torch.randint(3, 96, (12, 24), generator=torch.Generator().manual_seed(5)))
streaming.quantize_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), rows, Options(bits=4, group_size=32),
    dtype=torch.float32, device=torch.device("cpu"), resume=True, step=step)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_killed_in_every_block(tmp_path: Path):
    source = float_model(tmp_path)
    out = tmp_path / "out"
    for where in ("model.layers.0.self_attn.o_proj", "model.layers.1.mlp.experts.down"):
        done = subprocess.run([sys.executable, "-c", SCRIPT, source, out, where], cwd=ROOT, capture_output=True)
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()
        assert not (out / "model.safetensors.index.json").exists()
    quantize(source, out, resume=True)
    assert digests(out) == digests(quantize(source, tmp_path / "whole"))


def test_an_unfinished_run_is_not_overwritten_and_not_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source, out = float_model(tmp_path, "llama"), tmp_path / "out"

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(streaming, "_finish", full)
        with pytest.raises(OSError, match="No space left"):
            quantize(source, out)
    with pytest.raises(FileExistsError, match="--resume goes on with it"):
        quantize(source, out)
    with pytest.raises(ValueError, match="differs in parameters"):
        quantize(source, out, Options(bits=3, group_size=32), resume=True)
    quantize(source, out, resume=True)
    assert digests(out) == digests(quantize(source, tmp_path / "whole"))
    with pytest.raises(FileExistsError, match="not empty, and holds no unfinished run"):
        quantize(source, out, resume=True)


def test_a_disk_that_is_too_small_is_found_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = float_model(tmp_path, "llama")
    monkeypatch.setattr(streaming.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(OSError, match=r"0\.0 GB free, and 0\.0 GB are needed"):
        quantize(source, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    source, out = float_model(tmp_path, "llama"), tmp_path / "out"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"input_ids": row.tolist()}) + "\n" for row in ROWS))
    call = ["quantize", str(source), str(out), "--bits", "3", "--group-size", "32", "--desc-act", "--damp-percent"]
    call += ["0.05", "--dataset", str(tmp_path / "rows.jsonl"), "--seq-len", "16", "--tokens", "120", "--lm-head"]
    assert main(call) == 0
    assert "error / nearest" in capsys.readouterr().out
    parameters = json.loads((out / "quantize_config.json").read_text())
    wanted = {"bits": 3, "group_size": 32, "desc_act": True, "damp_percent": 0.05, "lm_head": True}
    assert wanted.items() <= parameters.items()
    assert parameters["meta"]["tokens"] == 120
    assert main(call) == 1
    assert "the folder is not empty" in capsys.readouterr().err


class Overflowing(torch.nn.Linear):
    """Overflows for rows of five tokens, although its inputs are numbers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + (math.inf if x.shape[1] == 5 else 0)


def test_values_that_are_no_numbers_name_the_block_and_the_batch():
    hidden = [torch.randn(2, tokens, 64) for tokens in (4, 3, 5, 4)]
    streams = engine.Streams([Call((), {})] * 4, hidden, list(hidden))
    with pytest.raises(ValueError, match=r"layers\.7: NaN or infinite values after it, in batch 2 of"), torch.no_grad():
        engine.quantize_block(torch.nn.Sequential(Overflowing(64, 64)), "layers.7", streams, OPTIONS)


def test_out_of_memory_names_the_block_and_what_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def full(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("tried to allocate")

    monkeypatch.setattr(engine, "solve", full)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"input_ids": ROWS[0].tolist()}))
    call = ["quantize", str(float_model(tmp_path, "llama")), str(tmp_path / "out"), "--group-size", "32"]
    assert main([*call, "--dataset", str(tmp_path / "rows.jsonl")]) == 1
    assert re.search(
        r"model\.layers\.0: out of memory with 24 calib.* take fewer.*--device cpu", capsys.readouterr().err
    )


def test_a_quantized_checkpoint_is_refused(tmp_path: Path):
    out = quantize(float_model(tmp_path, "llama"), tmp_path / "out")
    with pytest.raises(ValueError, match="quantized already"):
        quantize(out, tmp_path / "again")


def test_progress_is_told_with_the_time_left():
    assert bar("a.b", 0.25, 10) == "[######..................]  25 % 30 s left: a.b"


def test_dataset_files(tmp_path: Path):
    (tmp_path / "a.txt").write_text("some text\nand more")
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n\n{"input_ids": [1, 2]}\n')
    (tmp_path / "c.jsonl").write_text("{")
    assert texts(str(tmp_path / "a.txt")) == ["some text\nand more"]
    assert texts(str(tmp_path / "b.jsonl")) == [{"text": "a"}, {"input_ids": [1, 2]}]
    with pytest.raises(ValueError, match="line 1"):
        texts(str(tmp_path / "c.jsonl"))
    with pytest.raises(ValueError, match="no such file"):
        texts("ptb")
