"""``optimum.gptq.GPTQQuantizer`` quantizes with graftq."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.models import logits, tiny
from transformers import AutoModelForCausalLM, GPTQConfig

optimum = pytest.importorskip("optimum.gptq")


def rows(count: int = 12) -> list[list[int]]:
    return torch.randint(3, 96, (count, 24), generator=torch.Generator().manual_seed(5)).tolist()


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    tiny("llama").save_pretrained(tmp_path / "float")
    return tmp_path / "float"


def load(folder: Path, **arguments: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **arguments)


ARGUMENTS: dict[str, dict[str, Any]] = {
    "defaults, a mixture": {},
    "3 bits, act-order, damping": {"bits": 3, "desc_act": True, "damp_percent": 0.03},
    "asymmetric, as stored, all at once": {"sym": False, "act_group_aware": False, "true_sequential": False},
    "length, batches, one group": {"model_seqlen": 10, "batch_size": 64, "group_size": -1},
    "some modules": {
        "block_name_to_quantize": "model.layers",
        "modules_in_block_to_quantize": [["self_attn.q_proj"], ["mlp.up_proj"]],
    },
    "of graftq": {"effort": "autogptq", "static_groups": True, "desc_act": True, "lm_head": True},
    "without effect on values": {
        "meta": {"note": "mine"},
        "module_name_preceding_first_block": ["model.embed_tokens"],
        "pad_token_id": 0,
        "cache_block_outputs": False,
        "backend": "auto",
        "use_cuda_fp16": True,
    },
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_same_as_by_transformers(name: str, plain: Path, tmp_path: Path) -> None:
    if "mixture" in name:
        tiny("mixtral").save_pretrained(plain)
    arguments = {"bits": 4, "group_size": 32, "dataset": rows(), **ARGUMENTS[name]}
    quantizer, model = optimum.GPTQQuantizer(**arguments), load(plain)
    assert quantizer.quantize_model(model, tokenizer=None) is model
    quantizer.save(model, str(tmp_path / "optimum"))
    expected = load(plain, quantization_config=GPTQConfig(**arguments))
    expected.save_pretrained(tmp_path / "transformers")
    files = [load_file(tmp_path / each / "model.safetensors") for each in ("optimum", "transformers")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    stated = [
        json.loads((tmp_path / each / "quantize_config.json").read_text()) for each in ("optimum", "transformers")
    ]
    assert stated[0] == stated[1]
    assert "dataset" not in stated[0]
    assert torch.equal(logits(load(tmp_path / "optimum")), logits(model))


def test_what_is_written_shows_the_arguments(plain: Path, tmp_path: Path) -> None:
    quantizer = optimum.GPTQQuantizer(
        4, rows(), 32, 0.03, True, meta={"note": "mine"}, lm_head=True, static_groups=True, effort="high"
    )
    model = quantizer.quantize_model(load(plain))
    quantizer.save(model, str(tmp_path / "made"), max_shard_size="50KB")
    assert len(list((tmp_path / "made").glob("*.safetensors"))) > 1
    stated = json.loads((tmp_path / "made" / "quantize_config.json").read_text())
    assert (stated["damp_percent"], stated["static_groups"], stated["lm_head"]) == (0.03, True, True)
    assert (stated["meta"]["note"], stated["meta"]["effort"]) == ("mine", "high")
    with pytest.raises(ValueError, match="safe_serialization=False: graftq writes safetensors only"):
        quantizer.save(model, str(tmp_path / "again"), safe_serialization=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": None}, "no `dataset` to quantize with"),
        ({"act_aware": True}, "GPTQQuantizer: no argument act_aware"),
        ({"format": "gptq_v2"}, "format='gptq_v2': graftq writes 'gptq'"),
        ({"effort": "more"}, "effort='more': one of autogptq, normal, high"),
        ({"module_name_preceding_first_block": ["model.wte"]}, r"first_block: model\.wte: no such module"),
        ({"block_name_to_quantize": "model.h"}, "'model.h' is no list of blocks"),
        ({"modules_in_block_to_quantize": [["mlp.x"]]}, r"mlp\.x: no such module"),
        ({"dataset": "ptb"}, "wikitext2"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refused_by_name(arguments: dict[str, Any], message: str, plain: Path) -> None:
    model = load(plain)
    with pytest.raises(ValueError, match=message):
        optimum.GPTQQuantizer(**{"bits": 4, "group_size": 32, "dataset": rows(), **arguments}).quantize_model(model)
    assert not getattr(model, "is_quantized", False)


def test_other_models_are_refused(plain: Path) -> None:
    quantizer = optimum.GPTQQuantizer(bits=4, group_size=32, dataset=rows())
    with pytest.raises(TypeError, match="Linear is no model of transformers"):
        quantizer.quantize_model(torch.nn.Linear(32, 32))
    model = quantizer.quantize_model(load(plain))
    with pytest.raises(ValueError, match="quantized already"):
        quantizer.quantize_model(model)
