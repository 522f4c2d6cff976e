"""The model's own fields of ``config.json``: the float twin shows what transformers makes of them."""

from __future__ import annotations

import random

from fuzz.checkpoint import Checkpoint
from fuzz.registry import mutation
from fuzz.values import HOSTILE

SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
EXPERTS = ("num_local_experts", "num_experts_per_tok")


def _is_small(value: object) -> bool:
    return not isinstance(value, int | float) or abs(value) < 100


@mutation("fields")
def hostile_size(checkpoint: Checkpoint, generator: random.Random) -> None:
    values = [value for value in HOSTILE if _is_small(value)]
    checkpoint.config[generator.choice(SIZES)] = generator.choice(values)


@mutation("fields")
def slightly_other_size(checkpoint: Checkpoint, generator: random.Random) -> None:
    name = generator.choice(SIZES)
    checkpoint.config[name] += generator.choice([-32, -2, -1, 1, 2, 32])


@mutation("fields")
def half_or_double(checkpoint: Checkpoint, generator: random.Random) -> None:
    name = generator.choice(SIZES)
    checkpoint.config[name] = generator.choice([checkpoint.config[name] // 2, checkpoint.config[name] * 2])


@mutation("fields", architecture="mixtral")
def other_experts(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.config[generator.choice(EXPERTS)] = generator.choice([1, 2, 3, 5, 8, 0, None, "4", -1, 4.0])


@mutation("fields")
def fewer_layers(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "nothing"
    checkpoint.config["num_hidden_layers"] = generator.choice([0, 1])


@mutation("fields")
def more_layers(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "nothing"
    checkpoint.config["num_hidden_layers"] = generator.choice([3, 4, 10])


@mutation("fields")
def hostile_layers(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.config["num_hidden_layers"] = generator.choice([value for value in HOSTILE if _is_small(value)])


@mutation("fields")
def biases_on(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.config[generator.choice(["attention_bias", "mlp_bias"])] = True


@mutation("fields")
def tied_head(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.config["tie_word_embeddings"] = generator.choice([True, 1, "yes"])


@mutation("fields")
def other_dtype(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.config["dtype"] = generator.choice(
        ["float16", "bfloat16", "float64", "auto", "int32", "float8_e4m3fn", "x", 4]
    )


@mutation("fields")
def other_architecture(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.config["model_type"] = generator.choice(
        ["llama", "mistral", "qwen2", "mixtral", "gpt2", "bert", "x", None, 4]
    )


@mutation("fields")
def other_class(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.config["architectures"] = generator.choice([None, [], ["X"], "LlamaForCausalLM", 4, [4], ["LlamaModel"]])


@mutation("fields")
def other_computation(checkpoint: Checkpoint, generator: random.Random) -> None:
    """Fields that change the logits and not the weights."""
    field, values = generator.choice(
        [
            ("rms_norm_eps", [1e-3, 0, "1e-6", None]),
            ("hidden_act", ["gelu", "relu", "x", None]),
            ("rope_parameters", [{"rope_type": "default", "rope_theta": 500.0}, None, {}, "x"]),
            ("pad_token_id", [None, 5, -1, 10**6, "0"]),
            ("max_position_embeddings", [4, 2048, None]),
            ("attention_dropout", [0.5, "x"]),
            ("use_cache", [False, None, "x"]),
        ]
    )
    checkpoint.config[field] = generator.choice(values)


@mutation("fields")
def field_missing(checkpoint: Checkpoint, generator: random.Random) -> None:
    del checkpoint.config[generator.choice(sorted(checkpoint.config))]


@mutation("fields")
def own_code(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.config["auto_map"] = generator.choice(
        [{"AutoModelForCausalLM": "modeling.X"}, {}, "x", {"AutoConfig": "x"}]
    )
