"""LoRA on packed layers and experts: the adapters of the float model, trained, stored, switched and merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from packaging import version
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from support.checkpoints import write_pair
from support.examples import run_example
from support.gptq import Recipe
from support.loading import load
from support.models import logits, relative_error, tiny
from support.repacking import repacked  # noqa: F401 - a fixture
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.integrations.peft import MIN_PEFT_VERSION

from graftq.quant_linear.experts import QuantExperts
from graftq.quant_linear.layouts import SeparateLayout
from graftq.quant_linear.linear import QuantLinear

pytestmark = [
    # PEFT's own: it converts the old names of Mixtral's experts to patterns that it then looks for among modules alone.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys"),
    # transformers 5.23 renames it; PEFT, the Trainer of 5.16 and most users' code do not know yet.
    pytest.mark.filterwarnings(r"ignore:`\w*gradient_checkpointing\w*` is deprecated"),
]

TARGETS: dict[str, dict[str, Any]] = {
    "llama": {"target_modules": ["q_proj", "down_proj"]},
    "qwen2": {"target_modules": "all-linear"},
    "gpt2": {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
    "mixtral": {"target_modules": ["q_proj", "w1", "w2", "w3"]},
    "qwen3_moe": {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    "gpt_oss": {"target_modules": ["o_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: write_pair(tmp_path_factory.mktemp(name), tiny(name), Recipe()) for name in TARGETS}


def config(name: str = "llama", **changes: Any) -> LoraConfig:
    """Adapters that do something from the start."""
    defaults = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    return LoraConfig(**{**defaults, **TARGETS[name], **changes})


def adapted(checkpoint: Path, config: LoraConfig) -> Any:
    torch.manual_seed(0)
    return get_peft_model(load(checkpoint), config).eval()


def assert_like_dequantized(model: Any, folder: Path, checkpoint: Path) -> None:
    """What an adapter does to the packed model is what it does to the float one that loads it from disk."""
    model.save_pretrained(folder)
    plain = PeftModel.from_pretrained(load(checkpoint).dequantize(), folder)
    assert relative_error(logits(model), logits(plain)) < 1e-5
    assert relative_error(logits(model), logits(load(checkpoint))) > 1e-2


@pytest.mark.parametrize("name", TARGETS)
def test_an_adapter_does_what_it_does_to_the_float_model(
    name: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    assert_like_dequantized(adapted(checkpoints[name], config(name)), tmp_path, checkpoints[name])


@pytest.mark.usefixtures("repacked")
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_rearranged_weights(name: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    model = adapted(checkpoints[name], config(name))
    assert_like_dequantized(model, tmp_path, checkpoints[name])
    bare = model.unload()
    assert logits(bare).equal(logits(load(checkpoints[name])))
    fused = [m for m in bare.modules() if isinstance(m, QuantExperts) and not isinstance(m.layout, SeparateLayout)]
    assert len(fused) == (0 if name == "llama" else 2)


def test_all_linear_finds_packed_layers(checkpoints: dict[str, Path]) -> None:
    model = adapted(checkpoints["llama"], config(target_modules="all-linear"))
    bare = [n for n, m in model.named_modules() if isinstance(m, QuantLinear) and not n.endswith("base_layer")]
    assert not bare
    assert len(model.targeted_module_names) == 14


def test_dora(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    model = adapted(checkpoints["llama"], config(use_dora=True))
    assert_like_dequantized(model, tmp_path, checkpoints["llama"])


@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_initializations_that_would_change_packed_weights(how: str, checkpoints: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=f"init_lora_weights='{how}' changes the weights of the base layer"):
        adapted(checkpoints["llama"], config(init_lora_weights=how))


def test_experts_are_adapted_by_their_stacked_weights(checkpoints: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"target_parameters=\['gate_up_proj', 'down_proj'\], not target_modules"):
        adapted(checkpoints["gpt_oss"], config(target_modules=r".*\.experts"))


def test_an_adapter_around_one_experts_projection(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAFTQ_KERNEL", "torch")  # which keeps them apart
    model = adapted(
        checkpoints["gpt_oss"], LoraConfig(target_modules=r".*experts\.1\.down_proj", init_lora_weights=False)
    )
    assert relative_error(logits(model), logits(load(checkpoints["gpt_oss"]))) > 1e-4
    with pytest.raises(ValueError, match="not where it was loaded"):
        model.get_base_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"experts\.1\.down_proj"):
        model.get_base_model().dequantize()


def test_gradients_are_those_of_the_float_model(checkpoints: dict[str, Path]) -> None:
    gradients = []
    for dequantize in (False, True):
        base = load(checkpoints["mixtral"])
        torch.manual_seed(0)
        model = get_peft_model(base.dequantize() if dequantize else base, config("mixtral"))
        ids = torch.arange(3, 33).view(2, 15)
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert relative_error(*gradients) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype: torch.dtype, checkpoints: dict[str, Path]) -> None:
    model = get_peft_model(load(checkpoints["mixtral"], dtype=dtype), config("mixtral"))
    found = {p.dtype for name, p in model.named_parameters() if "lora" in name}
    assert found == {torch.float32}
    assert model(torch.tensor([[5, 6, 7]])).logits.dtype == dtype


def test_adapters_are_switched_and_disabled(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    base = logits(load(checkpoints["mixtral"]))
    model = adapted(checkpoints["mixtral"], config("mixtral"))
    model.add_adapter("other", config("mixtral"))
    one = logits(model)
    model.set_adapter("other")
    other = logits(model)
    with model.disable_adapter():
        assert logits(model).equal(base)
    model.set_adapter("default")
    assert logits(model).equal(one)
    assert relative_error(other, one) > 1e-2
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(checkpoints["mixtral"]), tmp_path)
    again.load_adapter(tmp_path / "other", "other")
    assert logits(again).equal(one)
    again.set_adapter("other")
    assert logits(again).equal(other)
    assert logits(again.unload()).equal(base)


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "gpt_oss"])
def test_merging_wants_a_dequantized_model(name: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    model = adapted(checkpoints[name], config(name))
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match="Cannot merge LORA layers when the model is gptq quantized"):
            merge()
    layer = next(m for m in model.modules() if hasattr(m, "merge") and hasattr(m, "lora_A"))
    with pytest.raises(ValueError, match="call dequantize"):
        layer.merge()
    expected = logits(model)
    model.get_base_model().dequantize()
    assert relative_error(logits(model), expected) < 1e-5
    merged = model.merge_and_unload()
    assert relative_error(logits(merged), expected) < 1e-5
    merged.save_pretrained(tmp_path)
    assert relative_error(logits(load(tmp_path)), expected) < 1e-5
    assert not any(name.endswith("qweight") for name in load_file(tmp_path / "model.safetensors"))


@pytest.mark.skipif(
    version.parse(peft.__version__) < version.parse(MIN_PEFT_VERSION),
    reason=f"these transformers load adapters of their own with PEFT {MIN_PEFT_VERSION} and newer",
)
def test_transformers_own_adapters(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    model = adapted(checkpoints["llama"], config())
    expected = logits(model)
    model.save_pretrained(tmp_path)
    again = load(checkpoints["llama"])
    again.load_adapter(tmp_path)
    assert logits(again).equal(expected)
    again.save_pretrained(tmp_path / "again")
    names = {path.name for path in (tmp_path / "again").iterdir()}
    assert "adapter_model.safetensors" in names
    assert "model.safetensors" not in names
    again.disable_adapters()
    assert logits(again).equal(logits(load(checkpoints["llama"])))


@pytest.mark.parametrize("model_class", [AutoModelForCausalLM, LlamaForCausalLM], ids=["Auto", "its own"])
def test_loading_an_adapter_brings_its_base_model(
    model_class: Any, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    model = adapted(checkpoints["llama"], config())
    model.save_pretrained(tmp_path)
    again = model_class.from_pretrained(tmp_path, dtype=torch.float32)
    assert logits(again).equal(logits(model))


def test_a_packed_model_by_itself_is_not_trainable(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    with pytest.raises(ValueError, match="fine-tuning on purely quantized models"):
        Trainer(model=load(checkpoints["llama"]), args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True))


def test_example() -> None:
    losses = [float(line.split()[-1]) for line in run_example("lora.py").splitlines() if line.startswith("step")]
    assert losses[-1] < losses[0]
