"""What would give a wrong model without a word: contradictions, lies about size, files taken for another format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import drop_g_idx, edit, edit_config, write_pair, zero_g_idx
from support.gptq import Recipe
from support.loading import assert_right, load
from support.models import tiny

from graftq.quant_linear.errors import CheckpointError

Copy = Callable[[str], Path]
State = dict[str, torch.Tensor]

UP = "model.layers.1.mlp.up_proj"


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def in_config(checkpoint: Path, **changes: Any) -> None:
    whole = json.loads((checkpoint / "config.json").read_text())
    edit_json(checkpoint / "config.json", quantization_config=whole["quantization_config"] | changes)


@pytest.mark.parametrize("method", ["GPTQ", "Gptq", "", " gptq ", None])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_method_that_is_gptq_however_it_is_written(name: str, method: str | None, copy: Copy) -> None:
    checkpoint = copy(name)
    in_config(checkpoint, quant_method=method)
    assert_right(checkpoint)


@pytest.mark.parametrize("beside", [True, False], ids=["both files", "config.json alone"])
@pytest.mark.parametrize("method", ["mxfp4", "awq", "fp8", "bitsandbytes_4bit", "no such", 0, False, ["gptq"], "\x1b"])
def test_a_method_that_is_not(method: Any, beside: bool, copy: Copy) -> None:
    checkpoint = copy("llama")
    in_config(checkpoint, quant_method=method)
    if not beside:
        (checkpoint / "quantize_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: .*quant_method is") as caught:
        load(checkpoint)
    assert str(caught.value).isprintable()


def test_switches_of_another_method(copy: Copy) -> None:
    checkpoint = copy("llama")
    in_config(checkpoint, load_in_4bit=True)
    with pytest.raises(CheckpointError, match=r"quant_method is 'bitsandbytes'"):
        load(checkpoint)


def test_bits_as_a_string_and_the_dataset_of_the_quantizer(copy: Copy, tmp_path: Path) -> None:
    checkpoint = copy("llama")
    edit_config(checkpoint, bits="4", group_size="32", dataset="ptb", self=1)
    model = assert_right(checkpoint)
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "quantize_config.json").read_text())["dataset"] == "ptb"


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("other", ["gptq", None])
def test_formats_that_contradict(other: str | None, swapped: bool, tmp_path: Path) -> None:
    checkpoint = write_pair(tmp_path, tiny("llama"), Recipe(sym=False, checkpoint_format="gptq_v2"))
    if swapped:
        in_config(checkpoint, checkpoint_format=other)
    else:
        edit_json(checkpoint / "quantize_config.json", checkpoint_format=other)
    message = r"config\.json: checkpoint_format is 'gptq\w*', but 'gptq\w*' in .*quantize_config\.json"
    with pytest.raises(CheckpointError, match=message):
        load(checkpoint)


@pytest.mark.parametrize("change", [drop_g_idx, zero_g_idx], ids=["missing", "all zeros"])
@pytest.mark.parametrize("stated", [True, False])
def test_orders_that_contradict(stated: bool, change: Callable[[State], None], tmp_path: Path) -> None:
    checkpoint = write_pair(tmp_path, tiny("llama"), Recipe(desc_act=False))
    in_config(checkpoint, desc_act=stated)
    edit_json(checkpoint / "quantize_config.json", desc_act=not stated)
    assert_right(checkpoint)  # g_idx decides
    edit(checkpoint, change)
    with pytest.raises(CheckpointError, match=rf"desc_act is {stated} in .*, but {not stated} in .*quantize"):
        load(checkpoint)


@pytest.mark.parametrize(("written", "label"), [("gptq", "gptq_v2"), ("gptq_v2", "gptq")])
def test_zero_points_of_the_other_format_though_called_asymmetric(written: str, label: str, tmp_path: Path) -> None:
    checkpoint = write_pair(tmp_path, tiny("llama"), Recipe(checkpoint_format=written))
    edit_config(checkpoint, sym=False)
    assert_right(checkpoint)
    edit_config(checkpoint, checkpoint_format=label)
    with pytest.raises(CheckpointError, match=f"labeled {label}"):
        load(checkpoint)


def test_an_unneeded_file_that_is_damaged(copy: Copy) -> None:
    checkpoint = copy("llama")
    (checkpoint / "quantize_config.json").write_bytes(b"[" * 100_000)
    with pytest.raises(CheckpointError, match=r"quantize_config\.json: not valid JSON: nested too deeply"):
        load(checkpoint)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_pair(tmp_path, tiny("llama"), Recipe(), layout="sharded")


def test_a_tensor_in_two_files(sharded: Path) -> None:
    first, second = (sharded / f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    name = next(name for name in load_file(first) if name.endswith("scales"))
    state = load_file(second) | {name: load_file(first)[name]}
    save_file(state, second, metadata={"format": "pt"})
    assert_right(sharded)
    state[name].view(-1)[-1] += 1
    save_file(state, second, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"00002-of-00002\.safetensors: {name}: .*00001.* has another tensor"):
        load(sharded)


@pytest.mark.parametrize("metadata", [None, [], "absent"])
def test_an_index_without_metadata(metadata: Any, sharded: Path) -> None:
    file = sharded / "model.safetensors.index.json"
    index = json.loads(file.read_text()) | {"metadata": metadata}
    if metadata == "absent":
        del index["metadata"]
    file.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"index\.json: no metadata in the index"):
        load(sharded)


@pytest.mark.parametrize("number", [0, 1])
def test_more_layers_than_the_model_has(number: int, copy: Copy) -> None:
    checkpoint = copy("llama")
    edit_json(checkpoint / "config.json", num_hidden_layers=number)
    with pytest.raises(CheckpointError, match=rf"layers\.{number}\.\S+: packed, but the model has no place"):
        load(checkpoint)


def test_layers_that_the_model_ignores(copy: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.1\."])
    checkpoint = copy("llama")
    edit_json(checkpoint / "config.json", num_hidden_layers=1)
    assert len(load(checkpoint).model.layers) == 1


def test_a_head_that_the_class_has_not(tmp_path: Path) -> None:
    from transformers import AutoModel

    checkpoint = write_pair(tmp_path, tiny("llama"), Recipe(), only="(proj|lm_head)$")
    assert AutoModel.from_pretrained(checkpoint, dtype=torch.float32).layers


@pytest.mark.parametrize("size", [{"num_key_value_heads": 1}, {"intermediate_size": 95}])
def test_lies_about_size(size: dict[str, int], copy: Copy) -> None:
    checkpoint = copy("llama")
    edit_json(checkpoint / "config.json", **size)
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.\S+: weights that are not zero for \d+ (in|out)puts"):
        load(checkpoint)


def as_fp8(state: State) -> None:
    name = "model.embed_tokens.weight"
    state[name] = state[name].to(torch.float8_e4m3fn)
    state[f"{name}_scale"] = torch.ones(1)


def pack_twice(state: State) -> None:
    state[f"{UP}.weight"] = torch.zeros(96, 64)


DAMAGE: dict[str, tuple[Callable[[State], object], str]] = {
    "8-bit floats": (as_fp8, r"embed_tokens\.weight: dtype F8_E4M3, which nothing here reads"),
    "packed and plain": (pack_twice, rf"{UP}: both packed and as a plain weight"),
    "scales of 1e30": (
        lambda state: state.update({f"{UP}.scales": torch.full((2, 96), 1e30)}),
        rf"{UP}\.scales: scales up to 1e\+30 overflow",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_what_has_no_reader(what: str, copy: Copy) -> None:
    damage, message = DAMAGE[what]
    checkpoint = copy("llama")
    edit(checkpoint, damage)
    with pytest.raises(CheckpointError, match=message):
        load(checkpoint)


def test_scales_beyond_half_precision(copy: Copy) -> None:
    checkpoint = copy("llama")
    edit(checkpoint, lambda state: state.update({f"{UP}.scales": torch.full((2, 96), 1e5)}))
    load(checkpoint)
    with pytest.raises(CheckpointError, match=r"scales up to 1e\+05 overflow in float16"):
        load(checkpoint, dtype=torch.float16)


@pytest.mark.parametrize("key", ["model_file_base_name", "model_basename", "transformers_weights"])
def test_a_pickle_outside_the_folder(key: str, copy: Copy) -> None:
    checkpoint = copy("llama")
    torch.save(load_file(checkpoint / "model.safetensors"), checkpoint.parent / "outside.bin")
    (checkpoint / "model.safetensors").unlink()
    if key == "transformers_weights":
        edit_json(checkpoint / "config.json", transformers_weights="../outside.bin")
    else:
        edit_config(checkpoint, **{key: "../outside"})
    with pytest.raises(CheckpointError, match=f"{key} names a file outside"):
        load(checkpoint, use_safetensors=False)


@pytest.mark.parametrize("content", [[torch.zeros(1)], {"model": {"a": torch.zeros(1)}}, {1: torch.zeros(1)}, {"a": 1}])
def test_pickles_that_hold_something_else(content: Any, copy: Copy) -> None:
    checkpoint = copy("llama")
    torch.save(content, checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: holds a .*, not a flat dict of tensors"):
        load(checkpoint, use_safetensors=False)


def test_names_are_escaped(copy: Copy) -> None:
    checkpoint = copy("llama")
    edit(checkpoint, lambda state: state.update({"x\x1b[2J\n.qweight": torch.zeros(8, 8, dtype=torch.int32)}))
    with pytest.raises(CheckpointError, match=r"x\\x1b\[2J\\n") as caught:
        load(checkpoint)
    assert str(caught.value).isprintable()


def test_an_empty_object_states_nothing(copy: Copy) -> None:
    checkpoint = copy("llama")
    edit_json(checkpoint / "config.json", quantization_config={})
    assert_right(checkpoint)
    (checkpoint / "quantize_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: bits missing"):
        load(checkpoint)
