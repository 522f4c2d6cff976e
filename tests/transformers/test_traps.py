"""What real checkpoints do: one test for each trap seen in the wild, under the trap's name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import drop_g_idx, edit, edit_config, write_pair, zero_g_idx
from support.gptq import Recipe
from support.loading import assert_right, load
from support.models import tiny

from graftq.quant_linear.errors import CheckpointError
from graftq.quant_linear.experts import QuantExperts
from graftq.quant_linear.linear import QuantLinear

Copy = Callable[[str], Path]
State = dict[str, torch.Tensor]


def test_parameters_only_in_quantize_config_json(tmp_path: Path) -> None:
    checkpoint = write_pair(tmp_path, tiny("llama"), Recipe(), layout="AutoGPTQ's")
    assert "quantization_config" not in json.loads((checkpoint / "config.json").read_text())
    assert_right(checkpoint)


@pytest.mark.parametrize(
    ("stem", "key"),
    [
        ("gptq_model-4bit-32g", None),
        ("weights-by-hand", "model_file_base_name"),
        ("weights-by-hand", "model_basename"),
        ("vicuna-7B-GPTQ-4bit-32g.no-act-order", None),
    ],
    ids=["AutoGPTQ's default", "model_file_base_name", "model_basename", "the only file"],
)
def test_file_named_otherwise(stem: str, key: str | None, copy: Copy) -> None:
    checkpoint = copy("llama")
    (checkpoint / "model.safetensors").rename(checkpoint / f"{stem}.safetensors")
    if key:
        edit_config(checkpoint, **{key: stem})
        (checkpoint / "another.safetensors").write_bytes(b"")
    assert_right(checkpoint)


def test_several_files_and_nothing_says_which(copy: Copy) -> None:
    checkpoint = copy("llama")
    (checkpoint / "model.safetensors").rename(checkpoint / "a.safetensors")
    (checkpoint / "b.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"several weight files.*a\.safetensors, b\.safetensors"):
        load(checkpoint)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "gptq_model-4bit-32g.bin", "gptq_model-4bit-32g.pt"])
def test_pickles_only_on_explicit_word(name: str, copy: Copy) -> None:
    checkpoint = copy("llama")
    torch.save(load_file(checkpoint / "model.safetensors"), checkpoint / name)
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"pickle.*save_file.*use_safetensors=False"):
        load(checkpoint)
    assert_right(checkpoint, use_safetensors=False)


def test_sharded_index_with_autogptqs_name(tmp_path: Path) -> None:
    checkpoint = write_pair(tmp_path, tiny("llama"), Recipe(), layout="sharded")
    stem = "gptq_model-4bit-32g"
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    for shard in set(index["weight_map"].values()):
        (checkpoint / shard).rename(checkpoint / shard.replace("model-", f"{stem}-"))
    index["weight_map"] = {name: file.replace("model-", f"{stem}-") for name, file in index["weight_map"].items()}
    (checkpoint / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    (checkpoint / "model.safetensors.index.json").unlink()
    assert_right(checkpoint)


@pytest.mark.parametrize(("written", "label"), [("gptq", "gptq_v2"), ("gptq_v2", "gptq")])
def test_v2_zeros_read_as_v1_and_the_reverse(written: str, label: str, tmp_path: Path) -> None:
    checkpoint = write_pair(tmp_path, tiny("llama"), Recipe(checkpoint_format=written))
    assert_right(checkpoint)
    edit_config(checkpoint, checkpoint_format=label)
    with pytest.raises(CheckpointError, match=f"qzeros: labeled {label}"):
        load(checkpoint)


def test_all_zero_bias_where_the_model_has_none(copy: Copy) -> None:
    checkpoint = copy("mixtral")
    assert any(name.endswith("w1.bias") for name in load_file(checkpoint / "model.safetensors"))
    assert_right(checkpoint)


def test_non_zero_bias_where_the_model_has_none(copy: Copy) -> None:
    checkpoint = copy("llama")
    edit(checkpoint, lambda state: state["model.layers.1.mlp.up_proj.bias"].fill_(0.5))
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: model\.layers\.1\.mlp\.up_proj\.bias: non-zero bias"
    ):
        load(checkpoint)


def test_bias_missing_where_the_model_has_one(tmp_path: Path) -> None:
    checkpoint = write_pair(tmp_path, tiny("qwen2"), Recipe())
    edit(checkpoint, lambda state: state.pop("model.layers.0.self_attn.q_proj.bias"))
    with pytest.raises(CheckpointError, match=r"self_attn\.q_proj: bias missing"):
        load(checkpoint)


@pytest.mark.parametrize("change", [drop_g_idx, zero_g_idx], ids=["missing", "all zeros"])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_g_idx_says_nothing_without_act_order(name: str, change: Callable[[State], None], tmp_path: Path) -> None:
    checkpoint = write_pair(tmp_path, tiny(name), Recipe(desc_act=False))
    edit(checkpoint, change)
    assert_right(checkpoint)


def test_g_idx_missing_under_act_order(copy: Copy) -> None:
    checkpoint = copy("llama")
    edit(checkpoint, drop_g_idx)
    with pytest.raises(CheckpointError, match="desc_act is true but g_idx is missing"):
        load(checkpoint)


@pytest.mark.parametrize("ordered", [True, False], ids=["sequential, desc_act true", "unordered, desc_act false"])
def test_g_idx_contradicts_desc_act(ordered: bool, tmp_path: Path) -> None:
    checkpoint = write_pair(tmp_path, tiny("llama"), Recipe(desc_act=not ordered))
    edit_config(checkpoint, desc_act=ordered)
    model = assert_right(checkpoint)
    assert model.model.layers[0].mlp.up_proj.spec.desc_act is not ordered


def test_g_idx_out_of_range(copy: Copy) -> None:
    checkpoint = copy("llama")
    edit(checkpoint, lambda state: state["model.layers.0.mlp.down_proj.g_idx"].__setitem__(3, 3))
    with pytest.raises(CheckpointError, match=r"down_proj\.g_idx: group 3 out of range"):
        load(checkpoint)


def test_desc_act_absent(copy: Copy) -> None:
    checkpoint = copy("llama")
    edit_config(checkpoint, desc_act=None)
    assert_right(checkpoint)


def test_old_and_new_expert_names(copy: Copy) -> None:
    """Both conventions are in test_architectures; here, that neither leaves a stock experts module behind."""
    experts = load(copy("mixtral")).model.layers[0].mlp.experts
    assert isinstance(experts, QuantExperts)
    assert experts.spec.names == ("gate_proj", "up_proj", "down_proj")


def test_modules_in_block_to_quantize_incomplete(copy: Copy) -> None:
    checkpoint = copy("mixtral")
    edit_config(checkpoint, modules_in_block_to_quantize=[["self_attn.k_proj", "block_sparse_moe.experts.0.w1"]])
    assert_right(checkpoint)


def test_lm_head_quantized(tmp_path: Path) -> None:
    model = assert_right(write_pair(tmp_path, tiny("llama"), Recipe(), only="(proj|lm_head)$"))
    assert isinstance(model.lm_head, QuantLinear)


def test_router_gate_quantized(tmp_path: Path) -> None:
    model = assert_right(write_pair(tmp_path, tiny("mixtral"), Recipe(), only=r"(proj|w[123]|gate)$"))
    assert model.model.layers[1].mlp.gate.weight.dtype == torch.float32


def dynamic_recipe(module: str) -> Recipe | None:
    if ".layers.0." in module:
        return Recipe(bits=8, group_size=16)
    return None if "o_proj" in module else Recipe()


DYNAMIC: dict[str, dict[str, Any]] = {r"+:.*\.layers\.0\..*": {"bits": 8, "group_size": 16}, r"-:.*o_proj": {}}


def test_dynamic_overrides(tmp_path: Path) -> None:
    checkpoint = write_pair(tmp_path, tiny("llama"), Recipe(), overrides=dynamic_recipe, dynamic=DYNAMIC)
    model = assert_right(checkpoint)
    assert [layer.mlp.up_proj.spec.bits for layer in model.model.layers] == [8, 4]
    assert type(model.model.layers[1].self_attn.o_proj) is torch.nn.Linear


def test_conv1d(tmp_path: Path) -> None:
    model = assert_right(write_pair(tmp_path, tiny("gpt2"), Recipe()))
    assert isinstance(model.transformer.h[0].attn.c_attn, QuantLinear)


def pad(state: State, module: str, columns: int, rows: int) -> None:
    """Pad a 4-bit module to ``columns`` more outputs and ``rows`` more inputs, as GPTQModel does."""
    sizes = {"qweight": (columns, rows // 8), "scales": (columns, 0), "qzeros": (columns // 8, 0), "bias": (columns,)}
    for suffix, size in sizes.items():
        name = f"{module}.{suffix}"
        if name in state:
            widths = [width for extra in size for width in (0, extra)]
            state[name] = torch.nn.functional.pad(state[name], widths)
    name = f"{module}.g_idx"
    state[name] = torch.cat((state[name], state[name].new_full((rows,), int(state[name].max()))))


def test_n_or_k_padded(tmp_path: Path) -> None:
    model = tiny("llama", hidden_size=40, intermediate_size=104, head_dim=16)
    checkpoint = write_pair(tmp_path, model, Recipe(group_size=32))
    edit(checkpoint, lambda state: pad(state, "model.layers.0.mlp.up_proj", columns=24, rows=24))
    assert_right(checkpoint)


def test_n_or_k_padded_beyond_a_block(copy: Copy) -> None:
    checkpoint = copy("llama")
    edit(checkpoint, lambda state: pad(state, "model.layers.0.mlp.up_proj", columns=0, rows=64))
    with pytest.raises(CheckpointError, match=r"mlp\.up_proj: .*qweight has 16 rows"):
        load(checkpoint)


@pytest.mark.parametrize("foreign", ["marlin", "bitblas", "awq"])
def test_other_formats_behind_a_gptq_label(foreign: str, copy: Copy) -> None:
    checkpoint = copy("llama")
    edit_config(checkpoint, checkpoint_format=foreign)
    with pytest.raises(CheckpointError, match=rf"config\.json: checkpoint_format is '{foreign}'"):
        load(checkpoint)


def test_fp16_overflow_needs_bf16(copy: Copy) -> None:
    """A model whose activations leave fp16's range must run in bf16."""

    def enlarge(state: State) -> None:
        state["model.layers.0.mlp.up_proj.scales"] *= 3e4

    checkpoint = copy("llama")
    edit(checkpoint, enlarge)
    model = load(checkpoint, dtype=torch.bfloat16)
    with torch.no_grad():
        assert model(torch.tensor([[5, 6, 7]])).logits.isfinite().all()


def test_pickles_may_hold_wide_g_idx(copy: Copy) -> None:
    checkpoint = copy("llama")
    state = load_file(checkpoint / "model.safetensors")
    wide = {name: tensor.long() if name.endswith(".g_idx") else tensor for name, tensor in state.items()}
    torch.save(wide, checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    assert_right(checkpoint, use_safetensors=False)
