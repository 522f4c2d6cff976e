"""The loading calls of programs that people run GPTQ checkpoints with, as their sources make them.

What depends on a program's settings has its default; what asks for a GPU asks for the CPU.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPTQConfig

from graftq.quant_linear.experts import QuantExperts
from graftq.quant_linear.linear import QuantLinear

Check = Callable[[Any], None]

LOADING_ATTRIBUTES = "ignore:You passed `quantization_config`:UserWarning"


@pytest.fixture
def named_by_autogptq(checkpoint: Path, tmp_path: Path) -> Path:
    """The checkpoint as AutoGPTQ saved them: its own file name, parameters in its own file alone."""
    folder = shutil.copytree(checkpoint, tmp_path / "someone_Tiny-GPTQ")
    (folder / "model.safetensors").rename(folder / "gptq_model-4bit--1g.safetensors")
    config = AutoConfig.from_pretrained(checkpoint)
    del config.quantization_config
    config.save_pretrained(folder)
    return folder


def assert_packed(model: Any) -> None:
    layer = model.model.layers[0]
    assert isinstance(layer.self_attn.q_proj, QuantLinear)
    assert isinstance(layer.mlp.experts, QuantExperts)


# text-generation-webui, modules/transformers_loader.py, load_model_HF (May 2026)


def webui_params(config: Any, **settings: Any) -> dict[str, Any]:
    dtype = getattr(config, "torch_dtype", None) or getattr(getattr(config, "text_config", None), "torch_dtype", None)
    half = dtype if dtype in (torch.float16, torch.bfloat16) else torch.float16
    return {"low_cpu_mem_usage": True, "attn_implementation": "sdpa", "torch_dtype": half, **settings}


def test_webui_default(checkpoint: Path, assert_true_logits: Check) -> None:
    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    assert not config.to_dict().get("is_encoder_decoder", False)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, **webui_params(config, device_map="auto"))
    assert not (hasattr(model, "is_loaded_in_4bit") and model.is_loaded_in_4bit)
    model = model.to("cpu")
    assert_packed(model)
    assert_true_logits(model)


def test_webui_cpu(named_by_autogptq: Path, assert_true_logits: Check) -> None:
    config = AutoConfig.from_pretrained(named_by_autogptq, trust_remote_code=False)
    params = webui_params(config, torch_dtype=torch.float32)
    assert_true_logits(AutoModelForCausalLM.from_pretrained(named_by_autogptq, **params))


def test_webui_memory_limit_and_disk(checkpoint: Path, tmp_path: Path, assert_true_logits: Check) -> None:
    """Its limits are whole GiB; this one makes the tiny checkpoint spill."""
    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    limits = {"device_map": "auto", "max_memory": {"cpu": "5MB"}, "offload_folder": str(tmp_path)}
    model = AutoModelForCausalLM.from_pretrained(checkpoint, **webui_params(config, **limits))
    assert "disk" in model.hf_device_map.values()
    assert_true_logits(model)


# text-generation-webui, modules/models.py, huggingface_loader (until January 2025)


@pytest.mark.filterwarnings(LOADING_ATTRIBUTES)
def test_webui_without_exllama(checkpoint: Path, assert_true_logits: Check) -> None:
    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    gptq_config = GPTQConfig(
        bits=config.quantization_config.get("bits", 4), disable_exllama=True, disable_exllamav2=True
    )
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint,
        low_cpu_mem_usage=True,
        torch_dtype=torch.float16,
        device_map="auto",
        quantization_config=gptq_config,
    )
    assert_packed(model)
    assert_true_logits(model)


# text-generation-webui, modules/AutoGPTQ_loader.py, load_quantized (until January 2025)


@pytest.mark.usefixtures("auto_gptq_asked_for")
@pytest.mark.parametrize("parameters", ["in the checkpoint", "from the settings"])
def test_webui_autogptq(parameters: str, named_by_autogptq: Path, assert_true_logits: Check) -> None:
    from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig

    if parameters == "from the settings":
        (named_by_autogptq / "quantize_config.json").unlink()
    found = list(named_by_autogptq.glob("*.safetensors"))
    quantize_config = None
    if not (named_by_autogptq / "quantize_config.json").exists():
        quantize_config = BaseQuantizeConfig(bits=4, group_size=-1, desc_act=False)
    params = {
        "model_basename": found[-1].stem,
        "device": "cpu",
        "use_triton": False,
        "inject_fused_attention": False,
        "inject_fused_mlp": True,
        "use_safetensors": found[-1].suffix == ".safetensors",
        "trust_remote_code": False,
        "max_memory": None,
        "quantize_config": quantize_config,
        "use_cuda_fp16": True,
        "disable_exllama": False,
        "disable_exllamav2": False,
    }
    model = AutoGPTQForCausalLM.from_quantized(named_by_autogptq, **params)
    assert hasattr(model, "model")
    assert hasattr(model, "dtype")
    assert hasattr(model.model.model, "embed_tokens")
    if not hasattr(model, "embed_tokens"):
        model.embed_tokens = model.model.model.embed_tokens
    model.model.embed_tokens = model.model.model.embed_tokens
    assert_packed(model.model)
    assert_true_logits(model)


# KoboldAI, modeling/inference_models/hf_torch.py, _get_model and _raw_generate (2025)


def kobold_device_map(config: Any) -> dict[str, str]:
    """Its layers one by one, and whatever module is left, as it finds them in a model without weights."""
    with torch.device("meta"):
        metamodel = AutoModelForCausalLM.from_config(config)
    layers = [f"model.layers.{number}" for number in range(config.num_hidden_layers)]
    others = [
        name
        for name, module in metamodel.named_modules()
        if name and not name.startswith("model.layers") and next(module.named_children(), None) is None
    ]
    return dict.fromkeys(layers + others, "cpu")


def kobold_generate(model: Any) -> torch.Tensor:
    prompt = torch.tensor([1, 5, 6, 7], dtype=torch.long)[None]
    with torch.no_grad():
        return model.generate(
            input_ids=prompt,
            do_sample=True,
            max_length=min(prompt.shape[1] + 4, 2048),
            repetition_penalty=1.0,
            bad_words_ids=[[30], [31]],
            use_cache=True,
            num_return_sequences=2,
        )


@pytest.mark.parametrize("blocks", ["in memory", "on disk"])
def test_koboldai(
    blocks: str,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    assert_true_logits: Check,
) -> None:
    monkeypatch.chdir(tmp_path)  # the folders it names are relative
    config = AutoConfig.from_pretrained(checkpoint, revision=None, cache_dir="cache")
    device_map = kobold_device_map(config)
    if blocks == "on disk":
        device_map["model.layers.0"] = "disk"
    model = AutoModelForCausalLM.from_pretrained(
        str(checkpoint),
        offload_folder="accelerate-disk-cache",
        torch_dtype=torch.float32,
        revision=None,
        cache_dir="cache",
        use_cache=True,
        device_map=device_map,
    )
    assert_packed(model)
    assert_true_logits(model)
    assert kobold_generate(model).shape == (2, 8)


# KoboldAI, modeling/inference_models/gptq_hf_torch/class.py, _get_model (until November 2023)


@pytest.mark.usefixtures("auto_gptq_asked_for")
def test_koboldai_autogptq(named_by_autogptq: Path, monkeypatch: pytest.MonkeyPatch, assert_true_logits: Check) -> None:
    import auto_gptq
    from auto_gptq import AutoGPTQForCausalLM

    from graftq.adapters.auto_gptq import modeling

    class Bleeding(AutoModelForCausalLM):
        """hf_bleeding_edge's, which it puts in the place of transformers' own."""

        called = 0

        @classmethod
        def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
            cls.called += 1
            return super().from_pretrained(*args, **kwargs)

    monkeypatch.setattr(modeling, "AutoModelForCausalLM", AutoModelForCausalLM)  # what is to be there again afterwards
    auto_gptq.modeling._utils.AutoConfig = AutoConfig
    auto_gptq.modeling._base.AutoConfig = AutoConfig
    auto_gptq.modeling._base.AutoModelForCausalLM = Bleeding

    gptq_file = str(next(named_by_autogptq.glob("*4bit*.safetensors")))
    model = AutoGPTQForCausalLM.from_quantized(
        str(named_by_autogptq),
        model_basename=Path(gptq_file).stem,
        use_safetensors=gptq_file.endswith(".safetensors"),
        device_map=kobold_device_map(AutoConfig.from_pretrained(named_by_autogptq)),
    )
    assert Bleeding.called == 1

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode(), torch.amp.autocast(device_type=self.device.type):
            return self.model.generate(*args, **kwargs)

    monkeypatch.setattr(type(model), "get_input_embeddings", lambda self: self.model.get_input_embeddings(), False)
    monkeypatch.setattr(type(model), "generate", generate)
    model.kai_model = object()
    assert model.get_input_embeddings().embedding_dim == 256
    assert_true_logits(model)
    assert kobold_generate(model).shape == (2, 8)


# LoLLMS, lollms_bindings_zoo, hugging_face/__init__.py, build_model (until April 2025)


@pytest.mark.filterwarnings(LOADING_ATTRIBUTES)
def test_lollms_gptq(named_by_autogptq: Path, checkpoint: Path, assert_true_logits: Check) -> None:
    for model_path in (checkpoint, named_by_autogptq):
        assert "gptq" in str(model_path).lower()
        tokenizer = AutoTokenizer.from_pretrained(str(model_path), padding_side="left")
        gptq_config = GPTQConfig(bits=4, tokenizer=tokenizer)
        model = AutoModelForCausalLM.from_pretrained(
            str(model_path),
            quantization_config=gptq_config,
            device_map="auto",
            trust_remote_code=False,
            low_cpu_mem_usage=True,
        )
        assert_packed(model)
        assert_true_logits(model)
        assert next(iter(model.parameters())).device.type == "cpu"


# LoLLMS, lollms_bindings_zoo, hugging_face/__init__.py, build_model (since)


def test_lollms_on_a_cpu(checkpoint: Path, assert_true_logits: Check) -> None:
    kwargs = {"trust_remote_code": False, "device_map": "auto", "torch_dtype": torch.float32}
    assert_true_logits(AutoModelForCausalLM.from_pretrained(checkpoint, **kwargs))


# LoLLMS, lollms_bindings_zoo, TGI/__init__.py, settings_updated and train


@pytest.mark.usefixtures("auto_gptq_asked_for")
def test_lollms_autogptq(checkpoint: Path, assert_true_logits: Check) -> None:
    from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig, exllama_set_max_input_length
    from auto_gptq.utils.peft_utils import GPTQLoraConfig, get_gptq_peft_model

    assert BaseQuantizeConfig
    assert GPTQLoraConfig
    model = AutoGPTQForCausalLM.from_quantized(
        str(checkpoint),
        model_basename="model",
        use_safetensors=True,
        trust_remote_code=False,
        use_triton=True,
        device="cpu",
        warmup_triton=False,
        trainable=True,
        inject_fused_attention=True,
        inject_fused_mlp=False,
    )
    assert model.device.type == "cpu"
    model = exllama_set_max_input_length(model, 4090)
    assert_true_logits(model)
    with pytest.raises(NotImplementedError, match="PEFT"):
        get_gptq_peft_model(model, model_id=str(checkpoint), train_mode=False)
