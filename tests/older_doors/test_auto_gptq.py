"""AutoGPTQ's ``from_quantized`` and ``BaseQuantizeConfig``, option by option."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import write_pair
from support.gptq import Recipe
from support.loading import load
from support.models import logits, relative_error, tiny
from transformers import AutoTokenizer, TextGenerationPipeline

from graftq.adapters.auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig
from graftq.quant_linear.errors import CheckpointError
from graftq.quant_linear.linear import QuantLinear

Check = Callable[[Any], None]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama as AutoGPTQ saves one: parameters in ``quantize_config.json`` alone."""
    folder = tmp_path_factory.mktemp("llama")
    return write_pair(folder, tiny("llama"), Recipe(zero_bias=True, sym=False), layout="AutoGPTQ's")


@pytest.fixture
def copied(llama: Path, tmp_path: Path) -> Path:
    """One that a test may change."""
    return shutil.copytree(llama, tmp_path / "gptq")


def from_quantized(folder: Path, **arguments: Any) -> Any:
    return AutoGPTQForCausalLM.from_quantized(folder, **{"torch_dtype": torch.float32, **arguments})


def assert_like_twin(model: Any, llama: Path) -> None:
    assert relative_error(logits(model), logits(load(llama.parent / "float"))) < 1e-5


def test_what_comes_back(checkpoint: Path, assert_true_logits: Check) -> None:
    model = from_quantized(checkpoint, device="cpu", use_safetensors=True)
    assert_true_logits(model)
    assert isinstance(model, torch.nn.Module)
    assert isinstance(model.model.model.layers[0].self_attn.q_proj, QuantLinear)
    assert not model.training
    assert (model.device, model.hf_device_map, model.model_type) == (torch.device("cpu"), {"": "cpu"}, "mixtral")
    assert model.config is model.model.config
    assert model.get_input_embeddings() is model.model.get_input_embeddings()
    assert model.quantized
    assert (model.quantize_config.bits, model.quantize_config.group_size, model.quantize_config.desc_act) == (
        4,
        -1,
        True,
    )
    assert model.quantize_config.model_file_base_name == "model"
    assert model.to("cpu") is model
    with pytest.raises(AttributeError, match="no attribute 'color'"):
        _ = model.color
    assert_true_logits(copy.deepcopy(model))


def test_saved_and_loaded_again(llama: Path, tmp_path: Path) -> None:
    model = from_quantized(llama)
    model.save_quantized(tmp_path)
    assert_like_twin(from_quantized(tmp_path, model_basename="model"), llama)
    with pytest.raises(ValueError, match="safetensors only"):
        model.save_quantized(tmp_path, use_safetensors=False)


def test_half_precision_is_the_default(llama: Path) -> None:
    assert AutoGPTQForCausalLM.from_quantized(llama).dtype == torch.float16
    assert from_quantized(llama, torch_dtype="auto").dtype == torch.float32


def test_generate_and_pipeline(checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = from_quantized(checkpoint)
    inputs = tokenizer("import os\n", return_tensors="pt", return_token_type_ids=False).to(model.device)
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=4)
    assert tokens.equal(model.generate(inputs["input_ids"], do_sample=False, max_new_tokens=4))
    generate = TextGenerationPipeline(model=model, tokenizer=tokenizer)
    (answer,) = generate("import os\n", do_sample=False, max_new_tokens=4)
    assert answer["generated_text"] == tokenizer.decode(tokens[0], skip_special_tokens=True)


PLACES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "device cpu": {"device": "cpu"},
    "a device": {"device": torch.device("cpu")},
    "device and max_memory": {"device": "cuda:0", "max_memory": {"cpu": "10GiB"}},
    "device_map auto": {"device_map": "auto"},
    "device_map and max_memory": {"device_map": {"": "cpu"}, "max_memory": {0: "1GiB"}},
    "empty device_map": {"device_map": {}, "device": "cpu"},
}


@pytest.mark.parametrize("what", PLACES)
def test_places(what: str, llama: Path) -> None:
    assert from_quantized(llama, **PLACES[what]).device == torch.device("cpu")


@pytest.mark.parametrize("device", ["cuda:0", 0])
def test_device_that_is_not_there(device: str | int, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from graftq.adapters.auto_gptq import modeling

    asked: dict[str, Any] = {}
    monkeypatch.setattr(
        modeling.AutoModelForCausalLM, "from_pretrained", lambda *_, **arguments: asked.update(arguments)
    )
    with pytest.raises(AttributeError):  # of None
        from_quantized(llama, device=device)
    assert asked["device_map"] == {"": 0}


def test_one_warning_names_what_is_ignored(llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "graftq"):
        from_quantized(
            llama,
            use_triton=True,
            inject_fused_attention=True,
            use_marlin=False,
            disable_exllama=True,
            strict=False,
            n_ctx=4,
        )
    (record,) = caplog.records
    assert record.getMessage() == (
        "graftq: from_quantized ignores disable_exllama, inject_fused_attention, use_triton: without meaning, as "
        "graftq chooses its kernels (GRAFTQ_KERNEL); n_ctx, strict: unknown"
    )


def test_no_warning_for_what_is_done_or_not_asked_for(llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        model = from_quantized(
            llama,
            use_triton=False,
            inject_fused_mlp=False,
            disable_exllamav2=False,
            low_cpu_mem_usage=True,
            use_cuda_fp16=True,
            quantize_config=None,
            revision="main",
            use_auth_token=None,
            trust_remote_code=True,
            attn_implementation="eager",
        )
    assert not caplog.records
    assert model.config._attn_implementation == "eager"


def test_model_basename_decides(copied: Path, llama: Path) -> None:
    """Also against ``model.safetensors``, which comes first where nothing is named."""
    file = next(copied.glob("*.safetensors"))
    state = load_file(file)
    save_file(
        {name: tensor * 0 for name, tensor in state.items()}, copied / "model.safetensors", metadata={"format": "pt"}
    )
    file.rename(copied / "no-act-order.safetensors")
    model = from_quantized(copied, model_basename="no-act-order")
    assert_like_twin(model, llama)
    assert model.quantize_config.model_file_base_name == "no-act-order"
    with pytest.raises(
        FileNotFoundError, match=r"no other\.safetensors\.index\.json or other\.safetensors, as model_base"
    ):
        from_quantized(copied, model_basename="other")


def test_name_in_the_checkpoints_own_parameters(copied: Path, llama: Path) -> None:
    next(copied.glob("*.safetensors")).rename(copied / "named.safetensors")
    shutil.copy(copied / "named.safetensors", copied / "another.safetensors")
    parameters = json.loads((copied / "quantize_config.json").read_text())
    (copied / "quantize_config.json").write_text(json.dumps({**parameters, "model_file_base_name": "named"}))
    model = from_quantized(copied)
    assert_like_twin(model, llama)
    assert model.quantize_config.model_file_base_name == "named"


def test_pickles(copied: Path, llama: Path) -> None:
    file = next(copied.glob("*.safetensors"))
    torch.save(load_file(file), copied / f"{file.stem}.bin")
    torch.save({}, copied / "optimizer-state.bin")
    file.unlink()
    with pytest.raises(CheckpointError, match=r"pickle.*use_safetensors=False"):
        from_quantized(copied)
    for named in ({}, {"model_basename": file.stem}):
        assert_like_twin(from_quantized(copied, use_safetensors=False, **named), llama)


def test_given_parameters(copied: Path, llama: Path) -> None:
    """For a checkpoint that has lost them; ``sym`` at its default is no claim about the zero points."""
    (copied / "quantize_config.json").unlink()
    with pytest.raises(ValueError, match="no quantized checkpoint, or one that has lost its parameters"):
        from_quantized(copied)
    given = BaseQuantizeConfig(bits=4, group_size=32, desc_act=False)
    assert_like_twin(from_quantized(copied, quantize_config=given), llama)
    assert_like_twin(from_quantized(copied, quantize_config={"bits": 4, "group_size": 32}), llama)
    with pytest.raises(CheckpointError, match="the configuration says 3 bits"):
        from_quantized(copied, quantize_config=BaseQuantizeConfig(bits=3, group_size=32))


def test_given_format_must_not_contradict(copied: Path, llama: Path) -> None:
    assert_like_twin(from_quantized(copied, checkpoint_format="gptq"), llama)
    parameters = json.loads((copied / "quantize_config.json").read_text())
    (copied / "quantize_config.json").write_text(json.dumps({**parameters, "checkpoint_format": "gptq_v2"}))
    for given in ({"quantize_config": BaseQuantizeConfig(4, 32)}, {"checkpoint_format": "gptq"}):
        with pytest.raises(ValueError, match=r"checkpoint_format='gptq', but .* says 'gptq_v2'"):
            from_quantized(copied, **given)


def test_what_graftq_does_not_do(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="this model is quantized"):
        from_quantized(llama).quantize([{"input_ids": [1]}])
    with pytest.raises(OSError, match="from_quantized"):
        AutoGPTQForCausalLM()
    with pytest.raises(ValueError, match=r"neither quantize_config\.json nor a quantization_config"):
        from_quantized(llama.parent / "float")
    monkeypatch.setenv("GRAFTQ_DISABLE", "1")
    with pytest.raises(RuntimeError, match="GRAFTQ_DISABLE is set"):
        from_quantized(llama)


def test_base_quantize_config(tmp_path: Path, checkpoint: Path) -> None:
    config = BaseQuantizeConfig.from_pretrained(checkpoint, revision="main")
    assert (config.bits, config.group_size, config.sym, config.damp_percent) == (4, -1, True, 0.1)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "quantize_config.json").read_text())
    assert written == config.to_dict()
    assert written["model_name_or_path"] == str(checkpoint)
    again = BaseQuantizeConfig.from_pretrained(tmp_path)
    again.model_name_or_path = config.model_name_or_path
    assert again == config


def test_base_quantize_config_from_config_json(tmp_path: Path, checkpoint: Path) -> None:
    shutil.copy(checkpoint / "config.json", tmp_path)
    assert BaseQuantizeConfig.from_pretrained(tmp_path).group_size == -1


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"bits": 5}, "bits is 5"),
        ({"bits": 4, "group_size": 0}, "group_size is 0"),
        ({"bits": 4, "quant_method": "awq"}, "quant_method is 'awq'"),
        ({"bits": 4, "is_marlin_format": True}, "checkpoint_format is 'marlin'"),
        ({"group_size": 128}, "bits missing"),
    ],
    ids=["5 bits", "group 0", "AWQ", "Marlin", "no bits"],
)
def test_parameters_that_gptq_does_not_have(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BaseQuantizeConfig.from_quant_config(raw)


def test_synonyms_and_unknown_parameters() -> None:
    config = BaseQuantizeConfig.from_quant_config({"W_BIT": 8, "q_group_size": 64, "color": "red"}, "gptq_v2")
    assert (config.bits, config.group_size, config.checkpoint_format) == (8, 64, "gptq_v2")
