"""``save_pretrained``: what was loaded comes back, bit for bit, under the names that it had."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import edit_config, write_pair
from support.examples import run_example
from support.gptq import Recipe
from support.loading import load
from support.models import logits, tiny
from support.repacking import repacked  # noqa: F401 - a fixture
from transformers import AutoModel

from graftq.adapters.transformers.saving import save_quantized
from graftq.quant_linear.experts import QuantExperts

ROOT = Path(__file__).parents[2]
REAL = ROOT / "examples" / "tiny-mixtral-gptq"
ROUTERS = r"(proj|w[123]|gate)$"

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Linear, biases of zeros": ("llama", {"recipe": Recipe(zero_bias=True)}),
    "Linear with biases": ("qwen2", {}),
    "Conv1D": ("gpt2", {}),
    "3 bits, sizes padded": ("llama", {"recipe": Recipe(bits=3, group_size=-1, sym=False)}),
    "gptq_v2": ("llama", {"recipe": Recipe(checkpoint_format="gptq_v2", desc_act=False)}),
    "scales in bfloat16": ("llama", {"recipe": Recipe(scales=torch.bfloat16)}),
    "experts": ("mixtral", {"recipe": Recipe(zero_bias=True)}),
    "experts beside others in float": ("mixtral", {"overrides": lambda m: Recipe() if "layers.1." in m else None}),
    "experts of latent attention": ("deepseek_v3", {}),
    "experts interleaved": ("gpt_oss", {}),
    "experts with one tensor of biases": ("gpt_oss", {"fused_bias": True, "expert_style": "GPTQModel's for GPT-OSS"}),
    "routers": ("mixtral", {"only": ROUTERS}),
    "head": ("llama", {"only": "(proj|lm_head)$"}),
    "shards": ("mixtral", {"layout": "sharded"}),
    "AutoGPTQ's files": ("llama", {"layout": "AutoGPTQ's"}),
}


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same(found: Path, expected: Path) -> None:
    old, new = state_of(expected), state_of(found)
    assert new.keys() == old.keys()
    different = [name for name in old if old[name].dtype != new[name].dtype or not old[name].equal(new[name])]
    assert not different


@pytest.fixture(params=["as stored", "rearranged"])
def layout(request: pytest.FixtureRequest) -> str:
    if request.param == "rearranged":
        request.getfixturevalue("repacked")
    return request.param


@pytest.mark.parametrize("what", MODELS)
def test_every_tensor_comes_back(what: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    name, arguments = MODELS[what]
    checkpoint = write_pair(tmp_path, tiny(name), **{"recipe": Recipe(), **arguments})
    load(checkpoint, dtype="auto").save_pretrained(tmp_path / "as stored")
    assert_same(tmp_path / "as stored", checkpoint)
    request.getfixturevalue("repacked")
    load(checkpoint, dtype="auto").save_pretrained(tmp_path / "rearranged")
    assert_same(tmp_path / "rearranged", checkpoint)


def test_real_checkpoint_in_shards(tmp_path: Path) -> None:
    load(REAL, dtype="auto").save_pretrained(tmp_path, max_shard_size="2MB")
    assert_same(tmp_path, REAL)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == state_of(REAL).keys()


def test_names_that_transformers_gives_on_request(originals: dict[str, Path], tmp_path: Path) -> None:
    load(originals["mixtral"]).save_pretrained(tmp_path, save_original_format=False)
    assert "model.layers.0.mlp.experts.3.down_proj.qweight" in state_of(tmp_path)
    assert logits(load(tmp_path)).equal(logits(load(originals["mixtral"])))


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
def test_offloaded_weights(name: str, originals: dict[str, Path], tmp_path: Path) -> None:
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    device_map = {**places, "model.rotary_emb": "cpu", "model.layers.1": "disk"}
    model = load(originals[name], device_map=device_map, offload_folder=tmp_path / "offloaded")
    model.save_pretrained(tmp_path / "saved", max_shard_size="100KB")
    assert_same(tmp_path / "saved", originals[name])


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
def test_offloaded_routers(tmp_path: Path) -> None:
    checkpoint = write_pair(tmp_path, tiny("mixtral"), Recipe(), only=ROUTERS)
    model = load(checkpoint, device_map={"": "disk"}, offload_folder=tmp_path / "offloaded")
    model.save_pretrained(tmp_path / "saved")
    assert_same(tmp_path / "saved", checkpoint)


def test_a_router_that_was_trained_is_saved_as_it_is_now(tmp_path: Path) -> None:
    checkpoint = write_pair(tmp_path, tiny("mixtral"), Recipe(), only=ROUTERS)
    model = load(checkpoint)
    with torch.no_grad():
        model.model.layers[0].mlp.gate.weight.mul_(2)
    model.save_pretrained(tmp_path / "saved")
    saved = state_of(tmp_path / "saved")
    assert "model.layers.0.block_sparse_moe.gate.weight" in saved
    assert "model.layers.1.block_sparse_moe.gate.qweight" in saved
    assert logits(load(tmp_path / "saved")).equal(logits(model))


def test_parameters_are_saved_as_they_were_read(tmp_path: Path) -> None:
    dynamic = {r"-:.*o_proj$": {}}
    checkpoint = write_pair(
        tmp_path,
        tiny("llama"),
        Recipe(),
        overrides=lambda m: None if m.endswith("o_proj") else Recipe(),
        dynamic=dynamic,
    )
    edit_config(checkpoint, lm_head=False, model_file_base_name="weights-by-hand", model_name_or_path="somebody/model")
    load(checkpoint).save_pretrained(tmp_path / "saved")
    read = json.loads((checkpoint / "quantize_config.json").read_text())
    expected = {**read, "model_file_base_name": "model"}
    assert json.loads((tmp_path / "saved" / "quantize_config.json").read_text()) == expected
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"] == expected


def test_what_the_parameters_leave_out_is_completed(tmp_path: Path) -> None:
    checkpoint = write_pair(tmp_path, tiny("llama"), Recipe(desc_act=False))
    edit_config(checkpoint, group_size=None, desc_act=None, sym=None)
    load(checkpoint).save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "quantize_config.json").read_text())
    assert {key: saved[key] for key in ("group_size", "desc_act", "sym")} == {
        "group_size": 32,
        "desc_act": False,
        "sym": True,
    }


def test_a_model_that_is_not_quantised_gets_no_parameters(originals: dict[str, Path], tmp_path: Path) -> None:
    load(originals["llama"].parent / "float").save_pretrained(tmp_path)
    assert not (tmp_path / "quantize_config.json").exists()


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_the_base_model_alone(name: str, layout: str, originals: dict[str, Path], tmp_path: Path) -> None:
    model = load(originals[name])
    model.model.save_pretrained(tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    found = AutoModel.from_pretrained(tmp_path, dtype=torch.float32)(ids).last_hidden_state
    assert found.equal(model.model(ids).last_hidden_state)


@pytest.mark.parametrize("size", ["50GB", "100KB"], ids=["one file", "shards"])
def test_autogptqs_names(size: str, layout: str, originals: dict[str, Path], tmp_path: Path) -> None:
    save_quantized(load(originals["mixtral"]), tmp_path, max_shard_size=size)
    names = {path.name for path in tmp_path.iterdir() if "safetensors" in path.name}
    assert all(name.startswith("gptq_model-4bit-32g") for name in names)
    assert ("gptq_model-4bit-32g.safetensors.index.json" in names) == (size == "100KB")
    assert_same(tmp_path, originals["mixtral"])
    assert logits(load(tmp_path)).equal(logits(load(originals["mixtral"])))


def test_autogptqs_names_are_not_for_uploads(originals: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="uploads nothing"):
        save_quantized(load(originals["llama"]), tmp_path, push_to_hub=True)


def test_over_the_files_it_was_loaded_from(copy: Callable[[str], Path]) -> None:
    checkpoint = copy("mixtral")
    expected = {name: tensor.clone() for name, tensor in state_of(checkpoint).items()}
    load(checkpoint).save_pretrained(checkpoint)
    assert all(tensor.equal(expected[name]) for name, tensor in state_of(checkpoint).items())


def test_without_its_parameters_nothing_is_saved(originals: dict[str, Path], tmp_path: Path) -> None:
    model = load(originals["llama"])
    del model.config.quantization_config
    with pytest.raises(ValueError, match=r"config\.quantization_config is gone"):
        model.save_pretrained(tmp_path)


def test_a_layer_elsewhere_is_refused(originals: dict[str, Path], tmp_path: Path) -> None:
    model = load(originals["llama"])
    model.model.layers[0].mlp.other = copy.deepcopy(model.model.layers[0].mlp.up_proj)
    with pytest.raises(ValueError, match=r"mlp\.other is not where it was loaded"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_and_pickles_can_be_saved(again: Any, layout: str, originals: dict[str, Path], tmp_path: Path) -> None:
    model = load(originals["mixtral"])
    twin = again(model)
    assert isinstance(twin.model.layers[0].mlp.experts, QuantExperts)
    assert logits(twin).equal(logits(model))
    twin.save_pretrained(tmp_path)
    assert_same(tmp_path, originals["mixtral"])


def test_example() -> None:
    assert "the same" in run_example("save_and_reload.py")


CHANGES: dict[str, Callable[[Any], Any]] = {
    "appended": lambda layers: layers.append(copy.deepcopy(layers[0])),
    "repeated": lambda layers: layers.append(layers[1]),
    "inserted": lambda layers: layers.insert(1, copy.deepcopy(layers[0])),
}


@pytest.mark.parametrize("change", CHANGES)
def test_layers_that_were_copied(change: str, originals: dict[str, Path], tmp_path: Path) -> None:
    model = load(originals["llama"])
    CHANGES[change](model.model.layers)
    with pytest.raises(ValueError, match=r"layers\.2\..*not where it was loaded.*added, copied or moved after loading"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("what", ["layer", "experts"])
def test_packed_weights_are_not_trained(what: str, originals: dict[str, Path]) -> None:
    layer = load(originals["mixtral"]).model.layers[0]
    module = layer.self_attn.q_proj if what == "layer" else layer.mlp.experts
    with pytest.raises(ValueError, match=r"packed weights cannot be trained: Quant.*; train adapters"):
        module.requires_grad_(True)
    assert module.requires_grad_(False) is module
