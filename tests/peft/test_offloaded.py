"""Adapters on packed layers whose weights are on the disk or lent from the CPU: they do what they do in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from peft import BOFTConfig, IA3Config, LoraConfig, PeftModel, get_peft_model
from support.checkpoints import write_pair
from support.gptq import Recipe
from support.loading import load
from support.models import relative_error, tiny

DEFAULTS: dict[str, Any] = {"init_lora_weights": False, "task_type": "CAUSAL_LM"}
CONFIGS: dict[str, Callable[[], Any]] = {
    "LoRA": lambda: LoraConfig(r=4, target_modules=["q_proj", "down_proj"], **DEFAULTS),
    "DoRA": lambda: LoraConfig(r=4, target_modules=["q_proj", "down_proj"], use_dora=True, **DEFAULTS),
    "IA3": lambda: IA3Config(target_modules=["q_proj"], feedforward_modules=[], init_ia3_weights=False),
    "BOFT, which multiplies by the weight": lambda: BOFTConfig(
        target_modules=["q_proj"], boft_block_size=4, init_weights=False
    ),
}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

pytestmark = [
    # accelerate's, as of any offloaded model: the adapters' files name no device
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    # transformers 5.23 renames it; PEFT does not know yet.
    pytest.mark.filterwarnings(r"ignore:`\w*gradient_checkpointing\w*` is deprecated"),
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: write_pair(tmp_path_factory.mktemp(name), tiny(name), Recipe(desc_act=True))
        for name in ("llama", "mixtral")
    }


def places(**others: str) -> dict[str, str]:
    parts = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
    return {**dict.fromkeys(parts, "cpu"), **others}


LAYER = places(**{"model.layers.1": "disk"})


def on_disk(checkpoint: Path, folder: Path, devices: dict[str, str] = LAYER) -> Any:
    return load(checkpoint, device_map=devices, offload_folder=folder)


def logits(model: Any) -> torch.Tensor:
    """Of ids on the CPU: the model's own device may be "meta"."""
    with torch.no_grad():
        return model(torch.tensor([[5, 6, 7, 8]])).logits


def adapted(model: Any, config: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(model, config).eval()


@pytest.mark.parametrize("method", CONFIGS)
def test_on_disk(method: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    expected = adapted(load(checkpoints["llama"]), CONFIGS[method]())
    found = adapted(on_disk(checkpoints["llama"], tmp_path), CONFIGS[method]())
    assert relative_error(logits(found), logits(expected)) < 1e-5
    with found.disable_adapter():
        assert relative_error(logits(found), logits(expected)) > 1e-3


def test_experts_on_disk(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=[], target_parameters=EXPERTS, **DEFAULTS)
    expected = adapted(load(checkpoints["mixtral"]), config)
    assert relative_error(logits(adapted(on_disk(checkpoints["mixtral"], tmp_path), config)), logits(expected)) < 1e-5


PLACED: dict[str, Callable[[Path, Path], Any]] = {
    "on the disk": on_disk,
    "all on the disk": lambda checkpoint, folder: on_disk(
        checkpoint, folder, {**dict.fromkeys(LAYER, "disk"), "model.embed_tokens": "cpu"}
    ),
    "lent from the CPU": lambda checkpoint, folder: cpu_offload(load(checkpoint), offload_buffers=True),
    "on the disk in a kernel's layout": lambda checkpoint, folder: dispatch_model(
        load(checkpoint), LAYER, main_device="cpu", offload_dir=folder, offload_buffers=True
    ),
}
LOADED: dict[str, Callable[[Any, Path], Any]] = {
    "PEFT": lambda model, adapter: PeftModel.from_pretrained(model, adapter),
    "PEFT, made empty": lambda model, adapter: PeftModel.from_pretrained(model, adapter, low_cpu_mem_usage=True),
    "transformers": lambda model, adapter: (model.load_adapter(adapter), model)[1],
}


@pytest.mark.parametrize(
    ("placed", "loaded"),
    [
        *(("on the disk", loaded) for loaded in LOADED),
        *((placed, "PEFT") for placed in list(PLACED)[1:]),
        ("lent from the CPU", "transformers"),
    ],
)
def test_loaded_on(placed: str, loaded: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    expected = adapted(load(checkpoints["llama"]), CONFIGS["LoRA"]())
    expected.save_pretrained(tmp_path / "adapter")
    model = PLACED[placed](checkpoints["llama"], tmp_path / "offloaded")
    devices = getattr(model, "hf_device_map", None)
    found = LOADED[loaded](model, tmp_path / "adapter")
    assert relative_error(logits(found), logits(expected)) < 1e-5
    assert getattr(model, "hf_device_map", None) == devices


def test_gradients(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    gradients = []
    for base in (load(checkpoints["llama"]), on_disk(checkpoints["llama"], tmp_path)):
        model = adapted(base, CONFIGS["LoRA"]())
        ids = torch.arange(3, 33).view(2, 15)
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert relative_error(*gradients) < 1e-5


@pytest.mark.parametrize("how", ["target_modules", "modules_to_save"])
def test_plain_layers_are_refused(how: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    model = on_disk(checkpoints["llama"], tmp_path, places(lm_head="disk", **{"model.layers.1": "disk"}))
    with pytest.raises(ValueError, match=r"^lm_head is offloaded, and PEFT leaves its adapter without values"):
        get_peft_model(model, LoraConfig(**{"target_modules": ["q_proj"], how: ["lm_head"]}))


def test_layers_that_the_block_brings_in_are_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    model = dispatch_model(
        load(checkpoints["llama"]),
        LAYER,
        main_device="cpu",
        offload_dir=tmp_path,
        offload_buffers=True,
        preload_module_classes=["LlamaMLP"],
    )
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj is offloaded"):
        get_peft_model(model, CONFIGS["LoRA"]())
