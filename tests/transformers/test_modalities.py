"""Models that read more than text, or answer with something else: each equals its float twin, by the plain call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.checkpoints import write_pair
from support.gptq import Recipe
from support.models import COMMON, relative_error

SMALL = {key: value for key, value in COMMON.items() if key not in ("head_dim", "tie_word_embeddings")}
VISION = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGE = 90
"""The token that stands for a patch of an image."""


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(3, 80, shape, generator=torch.Generator().manual_seed(1))


def floats(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def llava() -> tuple[Any, dict[str, Any]]:
    vision = transformers.CLIPVisionConfig(**VISION, image_size=16, patch_size=8, projection_dim=64)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=transformers.LlamaConfig(**SMALL), image_token_index=IMAGE, image_seq_length=4
    )
    tokens = torch.cat([ids(1, 3), torch.full((1, 4), IMAGE), ids(1, 5)], dim=1)
    return config, {"input_ids": tokens, "pixel_values": floats(1, 3, 16, 16)}


def whisper() -> tuple[Any, dict[str, Any]]:
    sizes = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    sizes |= {"encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "d_model": 64, "vocab_size": 96, "num_mel_bins": 8}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = transformers.WhisperConfig(**sizes, **special, max_source_positions=8, max_target_positions=16)
    return config, {"input_features": floats(1, 8, 16), "decoder_input_ids": ids(1, 5)}


def t5() -> tuple[Any, dict[str, Any]]:
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "vocab_size": 96}
    return transformers.T5Config(**sizes, decoder_start_token_id=0), {
        "input_ids": ids(2, 7),
        "decoder_input_ids": ids(2, 5),
    }


def bert() -> tuple[Any, dict[str, Any]]:
    return transformers.BertConfig(**{**VISION, "vocab_size": 96}, num_labels=3), {"input_ids": ids(2, 7)}


def qwen2() -> tuple[Any, dict[str, Any]]:
    return transformers.Qwen2Config(**SMALL, num_labels=3), {"input_ids": ids(2, 7)}


CASES = {
    "vision and language": ("AutoModelForImageTextToText", llava, r"proj|fc\d|linear_\d"),
    "audio": ("AutoModelForSpeechSeq2Seq", whisper, r"_proj|fc\d"),
    "encoder and decoder": ("AutoModelForSeq2SeqLM", t5, r"block.*\.(q|k|v|o|wi|wo)$"),
    "embeddings of an encoder": ("AutoModel", bert, r"encoder.*(query|key|value|dense)"),
    "embeddings of a decoder": ("AutoModel", qwen2, "_proj"),
    "classes of a sequence": ("AutoModelForSequenceClassification", qwen2, "_proj"),
    "classes of a sequence, by an encoder": ("AutoModelForSequenceClassification", bert, "encoder.*dense"),
    "classes of tokens": ("AutoModelForTokenClassification", qwen2, "_proj"),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_its_twin(case: str, tmp_path: Path) -> None:
    kind, make, packed = CASES[case]
    config, inputs = make()
    auto = getattr(transformers, kind)
    torch.manual_seed(0)
    checkpoint = write_pair(tmp_path, auto.from_config(config, dtype=torch.float32).eval(), Recipe(), only=packed)
    model, twin = (auto.from_pretrained(path, dtype=torch.float32) for path in (checkpoint, tmp_path / "float"))
    assert any(type(module).__name__ == "QuantLinear" for module in model.modules())
    with torch.no_grad():
        found, expected = (each(**inputs)[0].float() for each in (model, twin))
    assert relative_error(found, expected) < 1e-5
    if hasattr(model, "generate") and model.can_generate():
        tokens = [each.generate(**inputs, max_new_tokens=3, do_sample=False) for each in (model, twin)]
        assert tokens[0].equal(tokens[1])
    model.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        again = auto.from_pretrained(tmp_path / "saved", dtype=torch.float32)(**inputs)[0].float()
    assert again.equal(found)
