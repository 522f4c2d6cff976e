"""optimum's GPTQ functions without GPTQModel."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from support.checkpoints import edit, edit_config, write_pair
from support.gptq import Recipe
from support.loading import load
from support.models import logits, relative_error, tiny
from support.processes import run
from transformers import AutoConfig, AutoModelForCausalLM

from graftq.quant_linear.errors import CheckpointError
from graftq.quant_linear.linear import QuantLinear

optimum = pytest.importorskip("optimum.gptq")

Check = Callable[[Any], None]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pair(tmp_path_factory.mktemp("llama"), tiny("llama"), Recipe(group_size=16, sym=False))


@pytest.fixture
def copied(llama: Path, tmp_path: Path) -> Path:
    return shutil.copytree(llama.parent, tmp_path / "llama") / "gptq"


def empty(folder: Path, **arguments: Any) -> Any:
    """A model without weights, as optimum's documentation makes one."""
    config = AutoConfig.from_pretrained(folder)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, **{"dtype": torch.float32, **arguments})
    model.tie_weights()
    return model


def quantizer(folder: Path) -> Any:
    return optimum.GPTQQuantizer.from_dict(json.loads((folder / "quantize_config.json").read_text()))


def on_disk(layer: str) -> dict[str, str]:
    """A device map that leaves one layer of the Llama on disk."""
    others = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0", "model.layers.1")
    return {**dict.fromkeys(others, "cpu"), layer: "disk"}


def assert_like_twin(model: Any, folder: Path) -> None:
    assert relative_error(logits(model), logits(load(folder.parent / "float"))) < 1e-5


@pytest.mark.parametrize("declared", ["in the model", "in the folder"])
def test_load_mixtral(declared: str, checkpoint: Path, assert_true_logits: Check) -> None:
    model = empty(checkpoint)
    if declared == "in the folder":
        del model.config.quantization_config
    loaded = optimum.load_quantized_model(model, save_folder=str(checkpoint), device_map="auto")
    assert loaded is model
    assert_true_logits(model)
    assert (model.is_quantized, model.training, model.dtype) == (True, False, torch.float32)
    assert str(model.quantization_method.value) == "gptq"


def test_load_into_a_model_that_has_weights(llama: Path) -> None:
    model = load(llama.parent / "float")
    model.generation_config.max_new_tokens = 3
    assert_like_twin(optimum.load_quantized_model(model, str(llama)), llama)
    assert isinstance(model.model.layers[0].mlp.up_proj, QuantLinear)
    assert model.generate(torch.tensor([[1, 5]])).shape == (1, 5)


def test_load_by_file_name_and_offloaded(copied: Path, tmp_path: Path) -> None:
    edited = copied / "model.safetensors"
    shutil.copy(edited, copied / "chosen.safetensors")
    edit_config(copied, desc_act=False)
    edited.write_bytes(b"")
    model = optimum.load_quantized_model(
        empty(copied),
        str(copied),
        state_dict_name="chosen.safetensors",
        device_map=on_disk("model.layers.1"),
        offload_folder=str(tmp_path / "offload"),
        no_split_module_classes=["LlamaDecoderLayer"],
        offload_state_dict=True,
    )
    assert_like_twin(model, copied)


def test_load_refuses(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="Linear is no model of transformers"):
        optimum.load_quantized_model(torch.nn.Linear(2, 2), str(llama))
    with pytest.raises(ValueError, match=r"neither quantize_config\.json nor"):
        optimum.load_quantized_model(empty(llama.parent / "float"), str(tmp_path))


@pytest.mark.parametrize("place", ["in memory", "on disk"])
def test_convert_load_post_init(place: str, llama: Path, tmp_path: Path) -> None:
    """Step by step, as transformers and others called it."""
    converter = quantizer(llama)
    model = converter.convert_model(empty(llama.parent / "float"))
    device_map = on_disk("model.layers.1") if place == "on disk" else {"": "cpu"}
    model = load_checkpoint_and_dispatch(model, str(llama), device_map=device_map, offload_folder=str(tmp_path))
    model = converter.post_init_model(model)
    assert_like_twin(model, llama)
    layer = model.model.layers[1].mlp.up_proj
    assert layer.pinned == (place == "on disk")
    assert (layer.spec.desc_act, layer.spec.sym) == (True, False)
    assert model.quantize_config.desc_act


def test_convert_only_what_is_named(llama: Path) -> None:
    converter = quantizer(llama)
    converter.modules_in_block_to_quantize = [["self_attn.q_proj"], ["mlp.up_proj"]]
    layer = converter.convert_model(empty(llama.parent / "float")).model.layers[0]
    found = {name for name, module in layer.named_modules() if isinstance(module, QuantLinear)}
    assert found == {"self_attn.q_proj", "mlp.up_proj"}


@pytest.mark.parametrize("weights", ["meta", "cpu"])
def test_weights_that_never_came(weights: str, llama: Path) -> None:
    converter = quantizer(llama)
    model = empty(llama.parent / "float") if weights == "meta" else load(llama.parent / "float")
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.self_attn\.q_proj: no weights were loaded"):
        converter.post_init_model(converter.convert_model(model))


def test_damaged_weights(copied: Path) -> None:
    edit(copied, lambda state: state["model.layers.1.mlp.up_proj.g_idx"].fill_(99))
    converter = quantizer(copied)
    model = converter.convert_model(empty(copied.parent / "float"))
    model = load_checkpoint_and_dispatch(model, str(copied), device_map={"": "cpu"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.g_idx: group 99 out of range"):
        converter.post_init_model(model)


def test_format_is_kept(tmp_path: Path) -> None:
    recipe = Recipe(checkpoint_format="gptq_v2", sym=False)
    folder = write_pair(tmp_path, tiny("llama"), recipe)
    converter = quantizer(folder)
    assert converter.format == "gptq_v2"
    model = converter.convert_model(empty(folder.parent / "float"))
    model = load_checkpoint_and_dispatch(model, str(folder), device_map={"": "cpu"})
    assert_like_twin(converter.post_init_model(model), folder)


def test_experts_are_refused_by_name(checkpoint: Path) -> None:
    with pytest.raises(NotImplementedError, match=r"model\.layers\.0\.mlp\.experts: .*load_quantized_model"):
        quantizer(checkpoint).convert_model(empty(checkpoint))


def test_the_stock_way_of_quantizing_says_what_it_needs(llama: Path) -> None:
    chosen = optimum.GPTQQuantizer(bits=4, dataset=[[1, 2]], backend="marlin")
    with pytest.raises(RuntimeError, match="GPT-QModel is required"):
        chosen.quantize_model(load(llama.parent / "float"))


def test_loading_is_left_alone_beside_gptqmodel(tmp_path: Path) -> None:
    (tmp_path / "gptqmodel").mkdir()
    (tmp_path / "gptqmodel" / "__init__.py").write_text("")
    code = "from graftq.plugin import manager; print({k: v[0].__name__ for k, v in manager.seams('optimum').items()})"
    assert run("-c", code, path=[tmp_path]).stdout == "{'optimum.gptq.quantizer': '_patch_making'}\n"
    loading = "{'optimum.gptq.quantizer': '_patch_quantizer', 'optimum.gptq': '_patch_package'}\n"
    assert run("-c", code).stdout == loading
