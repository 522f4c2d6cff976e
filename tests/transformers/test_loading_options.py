"""The arguments that users give to ``from_pretrained``, on a checkpoint that is right without them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from copy import deepcopy as copy_of
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import edit_config, write_pair
from support.gptq import Recipe
from support.loading import assert_right, load
from support.models import logits, relative_error, tiny
from transformers import AutoModelForCausalLM, GPTQConfig, LlamaForCausalLM

from graftq.quant_linear.linear import QuantLinear

Copy = Callable[[str], Path]

DEVICE_MAPS: dict[str, Any] = {
    "none": None,
    "auto": "auto",
    "cpu": "cpu",
    "a device": torch.device("cpu"),
    "a dict": {"": "cpu"},
    "module by module": {"model": "cpu", "lm_head": "cpu"},
}


@pytest.mark.parametrize("what", DEVICE_MAPS)
def test_device_map(what: str, originals: dict[str, Path]) -> None:
    assert_right(originals["mixtral"], device_map=DEVICE_MAPS[what])


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_disk_offload(name: str, originals: dict[str, Path], tmp_path: Path) -> None:
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    device_map = {**places, "model.rotary_emb": "cpu", "model.layers.1": "disk"}
    model = assert_right(originals[name], device_map=device_map, offload_folder=tmp_path)
    layers = [module for module in model.model.layers[1].modules() if isinstance(module, QuantLinear)]
    assert layers
    assert all(tensor.is_meta for layer in layers for tensor in layer.parameters())
    assert not any(tensor.is_meta for tensor in model.model.layers[0].parameters())


def test_max_memory_forces_offload(originals: dict[str, Path], tmp_path: Path) -> None:
    model = load(originals["mixtral"], device_map="auto", max_memory={"cpu": "100KB"}, offload_folder=tmp_path)
    assert "disk" in model.hf_device_map.values()
    twin = load(originals["mixtral"].parent / "float")
    assert relative_error(logits(model), logits(twin)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, "float32", "auto"], ids=str)
def test_dtype(dtype: Any, originals: dict[str, Path]) -> None:
    model = load(originals["mixtral"], dtype=dtype)
    wanted = torch.float32 if dtype in ("auto", "float32") else dtype
    assert model.dtype == wanted
    assert {parameter.dtype for parameter in model.parameters()} == {wanted}
    assert {each.dtype for name, each in model.named_buffers() if name.endswith(".scales")} == {torch.float16}
    twin = load(originals["mixtral"].parent / "float")
    assert relative_error(logits(model), logits(twin)) < (1e-5 if wanted == torch.float32 else 0.1)


def test_class_of_the_model_itself(originals: dict[str, Path]) -> None:
    assert isinstance(LlamaForCausalLM.from_pretrained(originals["llama"]).model.layers[0].mlp.up_proj, QuantLinear)


def test_gptq_config_with_loading_attributes(originals: dict[str, Path]) -> None:
    with pytest.warns(UserWarning, match="loading attributes"):
        model = load(originals["llama"], quantization_config=GPTQConfig(bits=4, backend="torch"))
    assert model.config.quantization_config.backend == "torch"
    assert model.config.quantization_config.group_size == 32


def test_gptq_config_for_quantizing_with_a_backend_goes_to_the_stock_class(originals: dict[str, Path]) -> None:
    config = GPTQConfig(bits=4, dataset=["a text"], backend="auto_trainable")
    with pytest.raises((ImportError, RuntimeError), match=r"optimum|gptqmodel|GPU is required"):  # what it lacks first
        load(originals["llama"].parent / "float", quantization_config=config)


def test_a_good_checkpoint_prints_no_warning(copy: Copy, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = copy("mixtral")
    edit_config(checkpoint, desc_act=True, modules_in_block_to_quantize=[["self_attn.q_proj"]], damp_percent=1)
    for name in ("transformers", "graftq"):
        logging.getLogger(name).propagate = True
    with caplog.at_level(logging.WARNING):
        load(checkpoint, device_map="auto")
    assert not caplog.records


def test_progress_bar_stays(originals: dict[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    load(originals["llama"])
    assert "Loading weights" in capfd.readouterr().err


def test_subfolder(copy: Copy) -> None:
    checkpoint = copy("llama")
    model = AutoModelForCausalLM.from_pretrained(checkpoint.parent, subfolder=checkpoint.name, dtype=torch.float32)
    assert isinstance(model.model.layers[0].mlp.up_proj, QuantLinear)


def test_gradients_reach_the_activations(originals: dict[str, Path]) -> None:
    model = load(originals["mixtral"])
    assert not any(
        p.requires_grad for module in model.modules() if isinstance(module, QuantLinear) for p in module.parameters()
    )
    embeddings = model.get_input_embeddings()(torch.tensor([[5, 6, 7]])).detach().requires_grad_()
    model(inputs_embeds=embeddings).logits.sum().backward()
    assert embeddings.grad is not None
    assert embeddings.grad.abs().sum() > 0


def test_forced_kernel(originals: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFTQ_KERNEL", "warp-drive")
    with pytest.raises(RuntimeError, match=r"GRAFTQ_KERNEL=warp-drive: no such kernel; there are .*torch"):
        load(originals["llama"])


def test_a_copy_is_as_right(originals: dict[str, Path]) -> None:
    model = load(originals["mixtral"])
    assert logits(copy_of(model)).equal(logits(model))


def test_quantised_head_of_a_model_with_tied_embeddings(tmp_path: Path) -> None:
    checkpoint = write_pair(tmp_path, tiny("llama"), Recipe(), only="(proj|lm_head)$")
    config = checkpoint / "config.json"
    config.write_text(config.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    assert isinstance(assert_right(checkpoint).lm_head, QuantLinear)


def test_what_a_model_keeps_in_float32(originals: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import MixtralPreTrainedModel

    monkeypatch.setattr(MixtralPreTrainedModel, "_keep_in_fp32_modules_strict", {"input_layernorm"})
    model, twin = (
        load(path, dtype=torch.bfloat16) for path in (originals["mixtral"], originals["mixtral"].parent / "float")
    )
    expected = {name: parameter.dtype for name, parameter in twin.named_parameters()}
    found = {name: parameter.dtype for name, parameter in model.named_parameters() if name in expected}
    assert found == {name: expected[name] for name in found}
    assert set(found.values()) == {torch.float32, torch.bfloat16}
