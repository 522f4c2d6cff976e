"""Quantization parameters: every field by every hostile value, and the two files against each other."""

from __future__ import annotations

import copy
import random
from typing import Any

from fuzz.checkpoint import Checkpoint
from fuzz.registry import mutation
from fuzz.values import HOSTILE, hostile

FIELDS = ("bits", "group_size", "desc_act", "sym")
IGNORED = (
    "modules_in_block_to_quantize",
    "lm_head",
    "meta",
    "true_sequential",
    "static_groups",
    "damp_percent",
    "pad_token_id",
    "backend",
    "use_exllama",
    "exllama_config",
    "max_input_length",
    "cache_block_outputs",
    "use_cuda_fp16",
    "model_seqlen",
    "block_name_to_quantize",
    "module_name_preceding_first_block",
    "batch_size",
    "tokenizer",
    "dataset",
    "hyb_act",
    "act_group_aware",
    "model_name_or_path",
    "pack_dtype",
)
METHODS = ("awq", "mxfp4", "bitsandbytes", "fp8", "compressed-tensors", "aqlm", "eetq", "gptq_marlin", "marlin")


def _state(checkpoint: Checkpoint, generator: random.Random, **fields: Any) -> None:
    """Put the fields into one of the files, or into both."""
    stated = checkpoint.parameters()
    for parameters in generator.choice([stated, stated[:1], stated[-1:]]):
        parameters.update(copy.deepcopy(fields))


@mutation("parameters")
def undamaged(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.must_load = True


@mutation("parameters")
def hostile_field(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "base"
    _state(checkpoint, generator, **{generator.choice(FIELDS): hostile(generator)})


@mutation("parameters")
def several_hostile_fields(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "base"
    names = generator.sample(FIELDS + IGNORED, 3)
    _state(checkpoint, generator, **{name: hostile(generator) for name in names})


@mutation("parameters")
def ignored_field(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "base"
    _state(checkpoint, generator, **{generator.choice(IGNORED): hostile(generator)})


@mutation("parameters", checkpoint_format="gptq")
def hostile_format(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "base"
    fields = {"checkpoint_format": generator.choice([value for value in HOSTILE if value is not None])}
    fields["format"] = generator.choice(["gptq", fields["checkpoint_format"], hostile(generator)])
    _state(checkpoint, generator, **fields)


@mutation("parameters")
def other_format(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "nothing"
    name = generator.choice(["marlin", "bitblas", "gptq_v3", "gemm", "awq", "gptq_marlin", "gguf", "qqq"])
    _state(checkpoint, generator, checkpoint_format=name)


@mutation("parameters")
def method_spelled_otherwise(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.must_load = True
    _state(checkpoint, generator, quant_method=generator.choice(["GPTQ", "Gptq", " gptq ", "gPtQ"]))


@mutation("parameters")
def method_missing(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.must_load = True
    for parameters in checkpoint.parameters():
        parameters.pop("quant_method")


@mutation("parameters")
def other_method(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "base"
    _state(checkpoint, generator, quant_method=generator.choice(METHODS))


@mutation("parameters")
def hostile_method(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "base"
    _state(checkpoint, generator, quant_method=hostile(generator))


@mutation("parameters")
def unknown_field(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.must_load = True
    _state(
        checkpoint, generator, **{generator.choice(["x_unknown", "quantizer", "vendor", "note"]): hostile(generator)}
    )


@mutation("parameters")
def field_named_like_an_argument(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "base"
    names = [
        "self",
        "cls",
        "kwargs",
        "config",
        "__class__",
        "",
        "return_unused_kwargs",
        "config_dict",
        "quantization_config",
    ]
    for parameters in checkpoint.parameters():
        parameters[generator.choice(names)] = hostile(generator)


@mutation("parameters")
def field_missing(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "base"
    for parameters in checkpoint.parameters():
        parameters.pop(generator.choice([*FIELDS, "true_sequential", "damp_percent"]), None)


@mutation("parameters")
def no_object(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "base"
    value = generator.choice([value for value in HOSTILE if value is not None and not isinstance(value, dict)])
    # In config.json, transformers trips over it while it reads and logs its own configuration, before it asks anybody.
    checkpoint.beside = value


@mutation("parameters")
def no_parameters(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "nothing"
    empty: Any = generator.choice([None, {}])
    checkpoint.inside, checkpoint.beside = copy.copy(empty), None


@mutation("parameters")
def hostile_name_of_the_file(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "base"
    names = [
        "../model",
        "..",
        ".",
        "/etc/passwd",
        "a/b",
        "a\\b",
        "x" * 300,
        "\0",
        "model\n",
        "\x1b[31m",
        "C:model",
        "~",
    ]
    key = generator.choice(["model_file_base_name", "model_basename"])
    _state(checkpoint, generator, **{key: generator.choice([*names, *HOSTILE])})


@mutation("contradictions", sym=False, layout="TheBloke's")
def formats(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "nothing"
    pair = ["gptq", "gptq_v2"]
    generator.shuffle(pair)
    checkpoint.inside["checkpoint_format"], checkpoint.beside["checkpoint_format"] = pair


@mutation("contradictions", sym=False, layout="TheBloke's", checkpoint_format="gptq_v2")
def format_named_in_one(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "nothing"
    generator.choice(checkpoint.parameters()).pop("checkpoint_format")


@mutation("contradictions", sym=True)
def wrong_format_of_symmetric(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "nothing"
    for parameters in checkpoint.parameters():
        other = "gptq" if parameters["checkpoint_format"] == "gptq_v2" else "gptq_v2"
        parameters.update(checkpoint_format=other, sym=generator.choice([True, False, None]))


@mutation("contradictions", sym=True, layout="TheBloke's")
def formats_of_symmetric(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "base"
    pair = ["gptq", "gptq_v2"]
    generator.shuffle(pair)
    checkpoint.inside["checkpoint_format"], checkpoint.beside["checkpoint_format"] = pair


@mutation("contradictions", desc_act=True, layout="TheBloke's")
def order_without_g_idx(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "nothing"
    pair = [True, False]
    generator.shuffle(pair)
    checkpoint.inside["desc_act"], checkpoint.beside["desc_act"] = pair
    for module in checkpoint.packed():
        checkpoint.drop(f"{module}.g_idx")


@mutation("contradictions", layout="TheBloke's")
def one_file_wrong(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "base"
    field, values = generator.choice(
        [
            ("bits", [2, 3, 4, 8]),
            ("group_size", [16, 32, 64, 128, -1]),
            ("desc_act", [True, False]),
            ("sym", [True, False]),
        ]
    )
    generator.choice(checkpoint.parameters())[field] = generator.choice(values)


@mutation("contradictions")
def both_files_wrong(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "base"
    field, values = generator.choice([("bits", [2, 3, 4, 8]), ("group_size", [16, 32, 64, 128, -1])])
    value = generator.choice(values)
    for parameters in checkpoint.parameters():
        parameters[field] = value


@mutation("contradictions")
def order_against_g_idx(checkpoint: Checkpoint, generator: random.Random) -> None:
    """``g_idx`` decides, whatever is declared."""
    for parameters in checkpoint.parameters():
        parameters["desc_act"] = not parameters["desc_act"]


@mutation("contradictions", layout="TheBloke's")
def method_of_one_file(checkpoint: Checkpoint, generator: random.Random) -> None:
    checkpoint.accept = "base"
    generator.choice(checkpoint.parameters())["quant_method"] = generator.choice([*METHODS, None, "", 0, False])
