"""Which modules' numbers are beyond a model's last layer."""

from __future__ import annotations

from typing import Any

import pytest

from graftq.plugin.checkpoint.unread import beyond_the_last_layer

LAYER = "model.layers.{}.mlp.up_proj"
EXPERT = "model.layers.{}.mlp.experts.7.up_proj"


@pytest.mark.parametrize(
    ("config", "name", "found"),
    [
        ({"num_hidden_layers": 2}, LAYER, [2, 3]),
        ({"num_hidden_layers": 2}, EXPERT, [2, 3]),
        ({"n_layer": 1}, "transformer.h.{}.attn.c_attn", [1, 2, 3]),
        ({"num_hidden_layers": 0}, LAYER, [0, 1, 2, 3]),
        ({"num_hidden_layers": 2, "num_nextn_predict_layers": 1}, LAYER, [3]),
        ({"num_hidden_layers": 2, "num_mtp_modules": 2, "use_mtp": True}, LAYER, []),
        ({"text_config": {"num_hidden_layers": 3}}, "model.language_model.layers.{}.mlp.up_proj", [3]),
        ({"text_config": {"num_hidden_layers": 1}}, "visual.blocks.{}.mlp.up_proj", []),
        ({"num_hidden_layers": 1, "vision_config": {"depth": 4}}, "visual.blocks.{}.mlp.up_proj", []),
        ({"num_hidden_layers": 3, "quantization_config": {}}, LAYER, [3]),
        ({"num_hidden_layers": 2, "decoder_layers": 4}, "model.decoder.layers.{}.fc1", []),
        ({"num_hidden_layers": "2"}, LAYER, []),
        ({}, LAYER, []),
    ],
    ids=str,
)
def test_numbers(config: dict[str, Any], name: str, found: list[int]) -> None:
    names = [name.format(number) for number in range(4)]
    assert beyond_the_last_layer(["lm_head", *names], config) == [name.format(number) for number in found]
