"""``model.dequantize()``: the plain float model, as the formula gives it, and an ordinary checkpoint once saved."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import write_pair
from support.examples import run_example
from support.gptq import Recipe
from support.loading import load
from support.models import logits, relative_error, tiny
from support.processes import evaluate
from support.repacking import repacked  # noqa: F401 - a fixture

from graftq.quant_linear.experts import QuantExperts
from graftq.quant_linear.linear import QuantLinear

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Linear": ("llama", {"recipe": Recipe(zero_bias=True)}),
    "Linear with biases": ("qwen2", {}),
    "Conv1D": ("gpt2", {}),
    "experts": ("mixtral", {}),
    "experts beside others in float": ("mixtral", {"overrides": lambda m: Recipe() if "layers.1." in m else None}),
    "experts of latent attention": ("deepseek_v3", {}),
    "experts transposed": ("gpt_oss", {}),
    "experts transposed, gate and up apart": ("gpt_oss", {"split_gate_up": True}),
    "experts with one tensor of biases": ("gpt_oss", {"fused_bias": True}),
    "routers": ("mixtral", {"only": r"(proj|w[123]|gate)$"}),
    "head": ("llama", {"only": "(proj|lm_head)$"}),
}


def parameters(model: Any) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters())


@pytest.mark.parametrize("what", MODELS)
def test_the_model_that_was_quantized(what: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    name, arguments = MODELS[what]
    checkpoint = write_pair(tmp_path, tiny(name), **{"recipe": Recipe(), **arguments})
    twin = load(checkpoint.parent / "float")
    for fixture in ("", "repacked"):
        if fixture:
            request.getfixturevalue(fixture)
        model = load(checkpoint).dequantize()
        assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in twin.named_modules()]
        expected, found = parameters(twin), parameters(model)
        assert list(found) == list(expected)
        assert all(found[own].equal(expected[own]) for own in expected)
        assert all(parameter.requires_grad for parameter in found.values())
        assert logits(model).equal(logits(twin))


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_saved_it_is_an_ordinary_checkpoint(name: str, originals: dict[str, Path], tmp_path: Path) -> None:
    model = load(originals[name]).dequantize()
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert not (tmp_path / "quantize_config.json").exists()
    saved = load_file(tmp_path / "model.safetensors")
    twin = load_file(originals[name].parent / "float" / "model.safetensors")
    assert saved.keys() == twin.keys()
    assert all(saved[own].equal(twin[own]) for own in twin)


def test_without_graftq(originals: dict[str, Path], tmp_path: Path) -> None:
    model = load(originals["mixtral"]).dequantize()
    model.save_pretrained(tmp_path)
    code = (
        "from support.models import logits; from transformers import AutoModelForCausalLM; "
        f"print(logits(AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})).double().sum().item())"
    )
    assert float(evaluate(code, GRAFTQ_DISABLE="1")[-1]) == pytest.approx(logits(model).double().sum().item(), rel=1e-6)


def test_it_counts_as_float_afterwards(originals: dict[str, Path]) -> None:
    model = load(originals["mixtral"]).dequantize()
    assert not model.is_quantized
    assert not hasattr(model, "hf_quantizer")
    assert not hasattr(model.config, "quantization_config")
    assert model.to(torch.bfloat16).dtype == torch.bfloat16
    assert not any(isinstance(module, (QuantLinear, QuantExperts)) for module in model.modules())


@pytest.mark.parametrize("wanted", [torch.float16, torch.bfloat16], ids=str)
def test_another_dtype(wanted: torch.dtype, originals: dict[str, Path]) -> None:
    model = load(originals["mixtral"]).dequantize(dtype=wanted)
    twin = load(originals["mixtral"].parent / "float", dtype=wanted)
    assert {p.dtype for p in model.parameters()} == {wanted}
    assert all(parameter.equal(parameters(twin)[name]) for name, parameter in model.named_parameters())
    assert model.config.dtype == wanted


def test_after_saving(originals: dict[str, Path], tmp_path: Path) -> None:
    model = load(originals["llama"])
    model.save_pretrained(tmp_path)
    assert model.dequantize().dtype == torch.float32


def test_a_copy_is_dequantized_alone(originals: dict[str, Path]) -> None:
    model = load(originals["mixtral"])
    twin = copy.deepcopy(model).dequantize()
    assert isinstance(model.model.layers[0].mlp.experts, QuantExperts)
    assert relative_error(logits(twin), logits(model)) < 1e-5
    assert type(model.dequantize().model.layers[0].mlp.experts) is type(twin.model.layers[0].mlp.experts)


def test_a_head_of_its_own_is_not_tied_again(tmp_path: Path) -> None:
    checkpoint = write_pair(tmp_path, tiny("llama"), Recipe(), only="(proj|lm_head)$")
    config = checkpoint / "config.json"
    config.write_text(config.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    model = load(checkpoint).dequantize()
    model.save_pretrained(tmp_path / "saved")
    assert relative_error(logits(load(tmp_path / "saved")), logits(model)) < 1e-6


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    model = load(write_pair(tmp_path, tiny("gemma"), Recipe())).dequantize()
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_offloaded_weights_are_refused(originals: dict[str, Path], tmp_path: Path) -> None:
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    device_map = {**places, "model.rotary_emb": "cpu", "model.layers.1": "disk"}
    model = load(originals["llama"], device_map=device_map, offload_folder=tmp_path)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.q_proj is offloaded"):
        model.dequantize()
    assert isinstance(model.model.layers[0].self_attn.q_proj, QuantLinear)


def test_example() -> None:
    assert "MixtralExperts" in run_example("dequantize.py")
