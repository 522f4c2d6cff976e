"""The real server, ``--quantize gptq``: through transformers, on the flash path, and there in two shards."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from support.checkpoints import edit
from support.processes import ROOT
from support.tgi import INTERPRETER, Server, ServerFailed, ask, serve
from transformers import AutoTokenizer

pytestmark = pytest.mark.skipif(
    not INTERPRETER, reason="GRAFTQ_TEST_TGI names no interpreter with text_generation_server (see tests/tgi/prepare)"
)

REAL = ROOT / "examples" / "tiny-mixtral-gptq"
PATHS: dict[str, dict[str, Any]] = {
    "through transformers": {},
    "flash": {"flash": True},
    "flash, two shards": {"flash": True, "shards": 2},
}
PROMPTS = ("import os\nimport sys\n\n\ndef main(", "class Node:\n", "for i in range(10):\n    if")
CARD = {"do_sample": True, "temperature": 0.7, "top_p": 0.95, "top_k": 40, "repetition_penalty": 1.1, "seed": 7}
"""The sampling parameters of TheBloke's model cards."""

Checkpoints = Callable[[str], Path]
Greedy = Callable[[Path, str, int], list[int]]


@pytest.fixture(scope="module", params=PATHS)
def real(request: pytest.FixtureRequest, installed: Path) -> Iterator[Server]:
    with serve(REAL, "--quantize", "gptq", installed=installed, **PATHS[request.param]) as server:
        yield server


def alone(*requests: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """One conversation for each request."""
    return [[{"requests": [request]}] for request in requests]


def real_checkpoints() -> list[Path]:
    """The project's, and more in the folder that GRAFTQ_TEST_CHECKPOINTS names, each with its ``truth.npz``."""
    more = Path(os.environ.get("GRAFTQ_TEST_CHECKPOINTS", "/nowhere"))
    return [REAL, *sorted(path.parent for path in more.glob("*/truth.npz"))]


@pytest.mark.parametrize("checkpoint", real_checkpoints(), ids=lambda path: path.name)
@pytest.mark.parametrize("path", PATHS)
def test_tokens_of_a_real_checkpoint(path: str, checkpoint: Path, installed: Path) -> None:
    file = ROOT / "tests" / "data" / "tiny-mixtral-truth.npz" if checkpoint == REAL else checkpoint / "truth.npz"
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    with np.load(file) as truth, serve(checkpoint, "--quantize", "gptq", installed=installed, **PATHS[path]) as server:
        requests = [
            ask(prompt, tokenizer.decode(truth[f"ids{prompt}"].flatten(), skip_special_tokens=True), 32)
            for prompt in (0, 1)
        ]
        expected = {str(prompt): truth[f"greedy{prompt}"].flatten()[-32:].tolist() for prompt in (0, 1)}
        assert server.tokens([{"requests": requests}]) == [expected]
        assert server.tokens(*alone(*requests)) == [{key: tokens} for key, tokens in expected.items()]


@pytest.mark.parametrize(
    "name",
    [
        "mixtral 3-bit act-order",
        "mixtral 8-bit",
        "mixtral 4-bit asymmetric",
        "llama 2-bit v2",
        "llama 4-bit in order",
        "llama partly",
        "qwen2 with biases",
        "phi3, q, k and v in one",
        "gpt_neox, head by head",
        "deepseek_v3, groups of experts",
    ],
)
@pytest.mark.parametrize("path", PATHS)
def test_tokens_of_every_format(
    path: str, name: str, checkpoints: Checkpoints, greedy: Greedy, installed: Path
) -> None:
    checkpoint = checkpoints(name)
    with serve(checkpoint, "--quantize", "gptq", installed=installed, **PATHS[path]) as server:
        found = server.tokens([{"requests": [ask(number, prompt) for number, prompt in enumerate(PROMPTS)]}])
    twin = checkpoint.parent / "float"
    assert found == [{str(number): greedy(twin, prompt, 12) for number, prompt in enumerate(PROMPTS)}]


@pytest.mark.parametrize("real", ["flash", "flash, two shards"], indirect=True)
def test_requests_of_a_batch_end_at_different_times(real: Server, greedy: Greedy) -> None:
    """Not through transformers, whose newer caches the server cannot filter, quantized or not."""
    requests = [ask(number, prompt, 8 + 6 * number) for number, prompt in enumerate(PROMPTS)]
    expected = {str(number): greedy(REAL, prompt, 8 + 6 * number) for number, prompt in enumerate(PROMPTS)}
    assert server_tokens(real, requests) == expected


def server_tokens(server: Server, requests: list[dict[str, Any]]) -> dict[str, list[int]]:
    (answer,) = server.tokens([{"requests": requests}])
    return answer


@pytest.mark.parametrize("real", ["flash", "flash, two shards"], indirect=True)
def test_continuous_batching(real: Server, greedy: Greedy) -> None:
    steps = [{"after": 3 * number, "requests": [ask(number, prompt, 16)]} for number, prompt in enumerate(PROMPTS)]
    (found,) = real.tokens(steps)
    assert found == {str(number): greedy(REAL, prompt, 16) for number, prompt in enumerate(PROMPTS)}


@pytest.fixture(scope="module")
def twin(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The same model unquantized, served by the server alone."""
    folder = dequantized(tmp_path_factory.mktemp("twin"))
    with serve(folder, installed=installed, GRAFTQ_DISABLE="1") as server:
        yield server


def dequantized(folder: Path) -> Path:
    """A float copy of the real checkpoint, by the tests' own arithmetic."""
    from support.gptq import dequantize

    state = load_file(REAL / "model.safetensors")
    plain = {name: tensor for name, tensor in state.items() if name.endswith((".weight",))}
    for name, qweight in state.items():
        module, _, suffix = name.rpartition(".")
        if suffix == "qweight":
            own = {part: state[f"{module}.{part}"].numpy() for part in ("qzeros", "scales", "g_idx")}
            plain[f"{module}.weight"] = dequantize(qweight.numpy(), own["qzeros"], own["scales"], own["g_idx"], 4)
    shutil.copytree(REAL, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("quantize_config.json"))
    save_file(plain, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32"}))
    return folder


def test_sampling_draws_what_the_server_draws_from_the_float_model(real: Server, twin: Server) -> None:
    variants = [CARD, {"do_sample": True, "typical_p": 0.9, "seed": 3}, {"repetition_penalty": 1.3}]
    requests = alone(*(ask(0, PROMPTS[0], 16, **parameters) for parameters in variants))
    assert real.tokens(*requests) == twin.tokens(*requests)


def test_one_line_says_what_was_taken_over(real: Server) -> None:
    log = real.log.read_text()
    assert len(re.findall("graftq took over GPTQ loading in text_generation_server", log)) == 1


def test_quantisation_is_found_in_the_configuration(installed: Path, greedy: Greedy) -> None:
    with serve(REAL, installed=installed) as server:
        assert server_tokens(server, [ask(0, PROMPTS[0])]) == {"0": greedy(REAL, PROMPTS[0], 12)}


def test_switched_off(installed: Path) -> None:
    with (
        pytest.raises(ServerFailed, match="quantization is not available on CPU") as caught,
        serve(REAL, "--quantize", "gptq", installed=installed, GRAFTQ_DISABLE="1"),
    ):
        pass
    assert "graftq" not in str(caught.value).replace(str(installed), "")


@pytest.mark.parametrize("path", ["through transformers", "flash"])
def test_a_damaged_checkpoint_is_in_the_log(path: str, installed: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(REAL, checkpoint)
    name = "model.layers.0.block_sparse_moe.experts.2.w1.scales"
    edit(checkpoint, lambda state: state[name].view(-1).__setitem__(0, float("nan")))
    message = rf"CheckpointError: {checkpoint}/model\.safetensors: {re.escape(name)}: NaN values"
    with (
        pytest.raises(ServerFailed, match=message),
        serve(checkpoint, "--quantize", "gptq", installed=installed, **PATHS[path]),
    ):
        pass


def test_a_damaged_configuration_is_in_the_log(installed: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(REAL, checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"]["bits"] = "four"
    (checkpoint / "config.json").write_text(json.dumps(config))
    with (
        pytest.raises(ServerFailed, match=r"config\.json: bits is 'four', not an integer"),
        serve(checkpoint, "--quantize", "gptq", installed=installed, flash=True),
    ):
        pass
