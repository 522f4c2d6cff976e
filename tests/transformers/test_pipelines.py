"""Pipelines of others around a packed model: images with text, and embeddings of sentences; each as its float twin."""

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
WORDS = ("[PAD]", "[BOS]", "[EOS]", "[UNK]", "a", "cat", "sits", "on", "the", "mat", "what", "is", "this", "?")
IMAGE = len(WORDS)


def tokenizer() -> Any:
    """One token for each of the model's 96 ids, so that whatever it generates is text."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = (*WORDS, "<image>", *(f"word{i}" for i in range(IMAGE + 1, 96)))
    inner = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "[PAD]", "bos_token": "[BOS]", "eos_token": "[EOS]", "unk_token": "[UNK]"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, extra_special_tokens={"image_token": "<image>"}, **special
    )


def llava_processor() -> Any:
    size = {"height": 16, "width": 16}
    images = transformers.CLIPImageProcessor(size=size, crop_size=size)
    return transformers.LlavaProcessor(
        images, tokenizer(), patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def test_image_and_text(tmp_path: Path) -> None:
    pillow = pytest.importorskip("PIL.Image")
    vision = transformers.CLIPVisionConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=transformers.LlamaConfig(**SMALL), image_token_index=IMAGE
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    checkpoint = write_pair(tmp_path, model, Recipe(), only=r"proj|fc\d|linear_\d")
    pixels = torch.randint(0, 256, (20, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    image = pillow.frombytes("RGB", (24, 20), bytes(pixels.flatten().tolist()))
    texts = []
    for folder in (checkpoint, tmp_path / "float"):
        llava_processor().save_pretrained(folder)
        pipe = transformers.pipeline("image-text-to-text", model=str(folder), dtype=torch.float32)
        packed = [module for module in pipe.model.modules() if type(module).__name__ == "QuantLinear"]
        assert bool(packed) == (folder == checkpoint)
        found = pipe(images=image, text="<image> what is this ?", max_new_tokens=8, do_sample=False)
        texts.append(found[0]["generated_text"])
    blank = pipe(images=pillow.new("RGB", (24, 20)), text="<image> what is this ?", max_new_tokens=8, do_sample=False)
    assert texts[0] == texts[1] != blank[0]["generated_text"]


def test_sentence_transformer(tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    config = transformers.Qwen2Config(**SMALL)
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config, dtype=torch.float32).eval()
    checkpoint = write_pair(tmp_path, model, Recipe(), only="_proj")
    sentences = ["a cat sits on the mat", "what is this ?"]
    found = []
    for folder in (checkpoint, tmp_path / "float"):
        tokenizer().save_pretrained(folder)
        embedder = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
        assert any(type(module).__name__ == "QuantLinear" for module in embedder.modules()) == (folder == checkpoint)
        found.append(embedder.encode(sentences, convert_to_tensor=True))
    assert found[0].shape == (2, 64)
    assert relative_error(found[0], found[1]) < 1e-5
    embedder = sentence_transformers.SentenceTransformer(str(checkpoint), device="cpu")
    embedder.save_pretrained(str(tmp_path / "saved"))
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert again.encode(sentences, convert_to_tensor=True).equal(found[0])
