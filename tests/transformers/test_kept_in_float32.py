"""Modules that a model keeps in float32, since their values leave float16's range: packed, they compute in it, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.checkpoints import write_pair
from support.gptq import Recipe
from support.models import relative_error
from torch import nn

KERNELS = ("cpu", "torch")
PROJECTIONS = r"\.(q|k|v|o|wi|wi_0|wi_1|wo)$"
MODELS = {"T5": "gated-gelu", "UMT5": "gated-gelu", "MT5": "relu"}


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A model's class, and a checkpoint whose feed-forward outputs are beyond 65504."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{request.param}Config")(
        vocab_size=96, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, tie_word_embeddings=False,
        feed_forward_proj=MODELS[request.param],
    )  # fmt: skip
    kind = getattr(transformers, f"{request.param}ForConditionalGeneration")
    model = kind(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("wo.weight"):
                parameter.copy_(torch.randn_like(parameter) * 3000)
            elif parameter.ndim == 2:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return kind, write_pair(tmp_path_factory.mktemp(request.param), model, Recipe(), only=PROJECTIONS)


def run(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 25).view(2, 11)
    with torch.no_grad():
        return model.eval()(input_ids=ids, decoder_input_ids=ids[:, :5]).logits.float()


def outputs(model: Any) -> list[Any]:
    return [module for name, module in model.named_modules() if name.endswith(".wo")]


@pytest.mark.parametrize("kernel", KERNELS)
def test_as_in_the_float_model(kernel: str, pair: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    kind, checkpoint = pair
    monkeypatch.setenv("GRAFTQ_KERNEL", kernel)
    expected = run(kind.from_pretrained(checkpoint.parent / "float", dtype=torch.float32))
    twin = kind.from_pretrained(checkpoint.parent / "float", dtype=torch.float16)
    model = kind.from_pretrained(checkpoint, dtype=torch.float16)
    assert relative_error(run(model), expected) < 10 * relative_error(run(twin), expected) < 0.3
    assert {layer.weight.dtype for layer in outputs(model)} == {torch.float32}
    for layer in outputs(model):
        output = layer(torch.full((3, 96), 100.0, dtype=torch.float16))
        assert output.dtype == torch.float32
        assert output.isfinite().all()
        assert output.abs().max() > 65504


def test_saved_and_dequantized(pair: tuple[Any, Path], tmp_path: Path) -> None:
    kind, checkpoint = pair
    model = kind.from_pretrained(checkpoint, dtype=torch.float16)
    expected = run(model)
    nn.ModuleList([model]).half()
    assert relative_error(run(model), expected) < 0.01
    model.save_pretrained(tmp_path)
    old, new = (load_file(folder / "model.safetensors") for folder in (checkpoint, tmp_path))
    packed = [name for name in old if name.endswith((".qweight", ".qzeros", ".scales", ".g_idx"))]
    assert not [name for name in packed if old[name].dtype != new[name].dtype or not old[name].equal(new[name])]
    model.dequantize()
    assert {layer.weight.dtype for layer in outputs(model)} == {torch.float32}
    assert relative_error(run(model), expected) < 0.1


def test_not_in_bfloat16(pair: tuple[Any, Path]) -> None:
    """Whose range is float32's: the models keep nothing then."""
    kind, checkpoint = pair
    model = kind.from_pretrained(checkpoint, dtype=torch.bfloat16)
    assert {layer(torch.ones(1, 96, dtype=torch.bfloat16)).dtype for layer in outputs(model)} == {torch.bfloat16}


def test_under_autocast(pair: tuple[Any, Path]) -> None:
    kind, checkpoint = pair
    model = kind.from_pretrained(checkpoint, dtype=torch.float16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert {layer(torch.ones(1, 96)).dtype for layer in outputs(model)} == {torch.bfloat16}
