"""From the tensors that vLLM hands over to packed layers, on plain tensors: parts, ranks, and what is refused."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.gptq import Recipe
from support.models import relative_error
from support.vllm_layers import Checkpoint, create, experts_layer, fused_layer
from support.vllm_stand_in import LinearBase, ParallelLMHead, RoutedExperts, UnquantizedLinearMethod, installed

from graftq.quant_linear.errors import CheckpointError

ATTENTION = "model.layers.0.self_attn"
RECIPES = [Recipe(4), Recipe(3, sym=False), Recipe(3, 128), Recipe(2, desc_act=False), Recipe(8, -1)]


@pytest.fixture(scope="module", autouse=True)
def stand_in() -> Iterator[SimpleNamespace]:
    with installed("0.32.0") as registered:
        yield registered


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return Checkpoint(tmp_path)


def answer(method: Any, layer: Any, x: torch.Tensor) -> torch.Tensor:
    method.process_weights_after_loading(layer)
    return method.apply(layer, x, None)


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("alike", [True, False], ids=["one permutation", "three permutations"])
def test_columns(recipe: Recipe, ranks: int, alike: bool, checkpoint: Checkpoint) -> None:
    sizes = {"q": 128, "k": 64, "v": 64}
    for shard, size in sizes.items():
        checkpoint.add(f"{ATTENTION}.{shard}_proj", size, 256, recipe, like="q" if alike else "")
    config, x = checkpoint.config(), torch.randn(3, 256)
    by_rank = []
    for rank in range(ranks):
        layer, method = fused_layer(config, f"{ATTENTION}.qkv_proj", rank, ranks, 256, list(sizes.values()))
        for shard in ("v", "q", "k"):  # in any order
            checkpoint.hand_over(layer, f"{ATTENTION}.{shard}_proj", shard)
        out = answer(method, layer, x)
        by_rank.append(out.split([size // ranks for size in sizes.values()], dim=-1))
        assert len(layer.graftq) == (1 if alike or not recipe.desc_act or recipe.group_size == -1 else 3)
    for index, shard in enumerate(sizes):
        found = torch.cat([parts[index] for parts in by_rank], dim=-1)
        assert relative_error(found, x @ checkpoint.weights[f"{ATTENTION}.{shard}_proj"].T) < 1e-5


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_rows(recipe: Recipe, ranks: int, checkpoint: Checkpoint) -> None:
    name = f"{ATTENTION}.o_proj"
    checkpoint.add(name, 64, 320, recipe)  # 80 rows a rank: no multiple of 32, and inside a group of 128
    config, x, total = checkpoint.config(), torch.randn(3, 320), torch.zeros(3, 64)
    for rank in range(ranks):
        width = 320 // ranks
        layer = LinearBase(rank)
        method = config.get_quant_method(layer, name)
        create(method, layer, width, [64], (320, 64))
        checkpoint.hand_over(layer, name)
        total += answer(method, layer, x[:, rank * width : (rank + 1) * width])
    assert relative_error(total, x @ checkpoint.weights[name].T) < 1e-5


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_models_may_reorder_outputs(bits: int, checkpoint: Checkpoint) -> None:
    """As vLLM's Falcon does, along the dimension that a parameter says is that of the outputs."""
    name, heads, size = f"{ATTENTION}.query_key_value", 4, 32
    checkpoint.add(name, heads * 3 * size, 64, Recipe(bits))
    layer, x = LinearBase(), torch.randn(2, 64)
    method = checkpoint.config().get_quant_method(layer, name)
    create(method, layer, 64, [heads * size] * 3, (64, heads * 3 * size))
    for suffix in ("qweight", "qzeros", "scales", "g_idx"):
        parameter, tensor = getattr(layer, suffix), checkpoint.tensors[f"{name}.{suffix}"]
        if (dim := getattr(parameter, "output_dim", None)) is not None:
            tensor = tensor.unflatten(dim, (heads, 3, -1)).transpose(dim, dim + 1).flatten(dim, dim + 2)
        parameter.weight_loader(parameter, tensor)
    expected = checkpoint.weights[name].unflatten(0, (heads, 3, size)).transpose(0, 1).flatten(0, 2)
    assert relative_error(answer(method, layer, x), x @ expected.T) < 1e-5


def test_ranks_that_share_key_and_value_heads(checkpoint: Checkpoint) -> None:
    for shard, size in {"q": 128, "k": 64, "v": 64}.items():
        checkpoint.add(f"{ATTENTION}.{shard}_proj", size, 64, Recipe())
    config, x = checkpoint.config(), torch.randn(2, 64)
    for rank in range(4):
        layer = LinearBase(rank, num_kv_head_replicas=2)
        method = config.get_quant_method(layer, f"{ATTENTION}.qkv_proj")
        create(method, layer, 64, [32, 32, 32], (64, 4 * 96))
        for shard in "qkv":
            checkpoint.hand_over(layer, f"{ATTENTION}.{shard}_proj", shard)
        found = answer(method, layer, x).split(32, dim=-1)
        rows = {"q": rank * 32, "k": rank // 2 * 32, "v": rank // 2 * 32}
        for part, (shard, start) in zip(found, rows.items(), strict=True):
            weight = checkpoint.weights[f"{ATTENTION}.{shard}_proj"][start : start + 32]
            assert relative_error(part, x @ weight.T) < 1e-5


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("shard", [None, (0, 1)])
def test_fused_in_the_files(ranks: int, shard: Any, checkpoint: Checkpoint) -> None:
    name = "model.layers.0.mlp.gate_up_proj"
    checkpoint.add(name, 192, 64, Recipe(3))
    config, x = checkpoint.config(), torch.randn(2, 64)
    expected = (x @ checkpoint.weights[name].T).split([128, 64], dim=-1)
    for rank in range(ranks):
        layer, method = fused_layer(config, name, rank, ranks, 64, [128, 64])
        checkpoint.hand_over(layer, name, shard)
        found = answer(method, layer, x).split([128 // ranks, 64 // ranks], dim=-1)
        for part, whole in zip(found, expected, strict=True):
            assert relative_error(part, whole.chunk(ranks, dim=-1)[rank]) < 1e-5


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_padded_vocabulary(rank: int, checkpoint: Checkpoint) -> None:
    checkpoint.add("lm_head", 100, 64, Recipe())
    start, stop = min(rank * 64, 100), min(rank * 64 + 64, 100)
    indices = SimpleNamespace(org_vocab_start_index=start, org_vocab_end_index=stop)
    layer = ParallelLMHead(rank, org_vocab_size=100, shard_indices=indices)
    method = checkpoint.config().get_quant_method(layer, "lm_head")
    create(method, layer, 64, [64], (64, 192))
    checkpoint.hand_over(layer, "lm_head")
    x = torch.randn(2, 64)
    found = answer(method, layer, x)
    expected = torch.nn.functional.pad(x @ checkpoint.weights["lm_head"][start:stop].T, (0, 64 - (stop - start)))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("desc_act", [False, True], ids=["", "act-order"])
@pytest.mark.parametrize(
    ("ranks", "mine"),
    [(1, range(3)), (2, range(3)), (4, range(3)), (1, range(1, 3))],
    ids=["alone", "halves", "quarters", "other experts elsewhere"],
)
def test_experts(ranks: int, mine: range, desc_act: bool, checkpoint: Checkpoint) -> None:
    """The ranks' parts add up; which inner features each has is theirs to choose."""
    prefix = "model.layers.0.mlp.experts"
    checkpoint.add_experts(prefix, 3, 96, 64, Recipe(3, 16, desc_act))
    x, ids = torch.randn(4, 96), torch.tensor([[0, 1], [1, 2], [2, 0], [0, 1]], dtype=torch.int32)
    weights = torch.rand(4, 2)
    total = torch.zeros(4, 96)
    for rank in range(ranks):
        layer, method = experts_layer(checkpoint, prefix, 3, mine, rank, ranks)
        total += method.apply(layer, x, weights, ids, None, None)
    assert relative_error(total, checkpoint.experts(prefix, x, ids, weights, mine, slice(None))) < 1e-5


def test_files_decide_what_is_quantized(checkpoint: Checkpoint) -> None:
    checkpoint.add("model.layers.0.mlp.down_proj", 64, 64, Recipe())
    checkpoint.tensors["model.layers.0.mlp.router.weight"] = torch.zeros(4, 64)
    checkpoint.tensors["lm_head.weight"] = torch.zeros(8, 64)
    config = checkpoint.config()
    assert isinstance(config.get_quant_method(LinearBase(), "model.layers.0.mlp.router"), UnquantizedLinearMethod)
    assert config.get_quant_method(ParallelLMHead(), "lm_head") is None
    assert (
        config.get_quant_method(RoutedExperts("model.layers.0.experts", range(2), 2), "model.layers.0.experts") is None
    )
    assert config.get_quant_method(torch.nn.Module(), "model.layers.0.mlp.down_proj") is None
    assert config.get_quant_method(LinearBase(), "model.layers.0.mlp.down_proj").names == [
        "model.layers.0.mlp.down_proj"
    ]


def test_names_follow_the_model(checkpoint: Checkpoint) -> None:
    checkpoint.add("model.layers.0.mlp.down_proj", 64, 64, Recipe())
    config = checkpoint.config()
    renamed = SimpleNamespace(apply_list=lambda names: [name.replace("model.", "language.", 1) for name in names])
    config.apply_vllm_mapper(renamed)
    for prefix in ("language.layers.0.mlp.down_proj", "some.code.layers.0.mlp.down_proj"):
        assert config.get_quant_method(LinearBase(), prefix).names == ["model.layers.0.mlp.down_proj"]


def test_half_quantised_fused_layer(checkpoint: Checkpoint) -> None:
    checkpoint.add(f"{ATTENTION}.q_proj", 64, 64, Recipe())
    checkpoint.tensors[f"{ATTENTION}.k_proj.weight"] = torch.zeros(64, 64)
    with pytest.raises(CheckpointError, match=r"q_proj: quantized, but .*k_proj is not"):
        checkpoint.config().get_quant_method(LinearBase(), f"{ATTENTION}.qkv_proj")


def _lose(suffix: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.__delitem__(f"{ATTENTION}.o_proj.{suffix}")


def _set(suffix: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], None]:
    name = f"{ATTENTION}.o_proj.{suffix}"
    return lambda tensors: tensors.update({name: change(tensors[name]).contiguous()})


def _add(name: str, dtype: torch.dtype) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({name: torch.zeros(8, 64, dtype=dtype)})


DAMAGES = {
    "no scales": (_lose("scales"), "o_proj: scales missing"),
    "no g_idx": (_lose("g_idx"), "o_proj: desc_act is true but g_idx is missing"),
    "g_idx out of range": (_set("g_idx", lambda t: t + 2), "o_proj.g_idx: group 3 out of range"),
    "NaN": (_set("scales", lambda t: t * float("nan")), "o_proj.scales: NaN"),
    "narrow qweight": (_set("qweight", lambda t: t[:, :32]), "o_proj: qweight has 32 columns, the layer 64 outputs"),
    "short qweight": (_set("qweight", lambda t: t[:-1]), "o_proj: .* qweight has 7 rows"),
    "float zero points": (_set("qzeros", lambda t: t.float()), "o_proj.qzeros: dtype F32"),
    "v2 zero points": (_set("qzeros", lambda t: t + 0x11111111), "o_proj.qzeros: labeled gptq, but"),
    "bias": (lambda t: t.update({f"{ATTENTION}.o_proj.bias": torch.ones(64)}), "o_proj.bias: non-zero bias"),
    "scales beyond float16": (
        _set("scales", lambda t: t.float() * 0 + 6e4),
        r"o_proj.scales: .*6e\+04 overflow in float16",
    ),
    "8-bit floats": (_add("lm_head.weight", torch.float8_e4m3fn), "lm_head.weight: dtype F8_E4M3, which nothing"),
    "integers": (_add("model.embed_tokens.weight", torch.int8), "embed_tokens.weight: dtype I8 for a weight of floats"),
    "packed and plain": (_add(f"{ATTENTION}.o_proj.weight", torch.float16), "o_proj: both packed and as a plain"),
    "a layer too many": (
        _add("model.layers.1.mlp.up_proj.qweight", torch.int32),
        "layers.1.mlp.up_proj: packed, but the",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(damage: str, checkpoint: Checkpoint) -> None:
    change, said = DAMAGES[damage]
    name = f"{ATTENTION}.o_proj"
    checkpoint.add(name, 64, 64, Recipe())
    change(checkpoint.tensors)
    layer, config = LinearBase(), checkpoint.config()
    with pytest.raises(CheckpointError, match=said) as caught:  # noqa: PT012 - some show before loading, some after
        method = config.get_quant_method(layer, name)
        create(method, layer, 64, [64], (64, 64), torch.float16)
        checkpoint.hand_over(layer, name)
        method.process_weights_after_loading(layer)
    assert caught.value.file == str(checkpoint.folder / "model.safetensors")


def test_layers_for_further_tokens_are_left_out(checkpoint: Checkpoint) -> None:
    for number in (0, 1):
        checkpoint.add(f"model.layers.{number}.mlp.up_proj", 64, 64, Recipe())
    checkpoint.model["num_nextn_predict_layers"] = 1
    assert checkpoint.config().get_quant_method(LinearBase(), "model.layers.0.mlp.up_proj").names


def test_nothing_arrives(checkpoint: Checkpoint) -> None:
    for shard in "qkv":
        checkpoint.add(f"{ATTENTION}.{shard}_proj", 64, 64, Recipe())
    layer, method = fused_layer(checkpoint.config(), f"{ATTENTION}.qkv_proj", 0, 1, 64, [64, 64, 64])
    checkpoint.hand_over(layer, f"{ATTENTION}.q_proj", "q")
    with pytest.raises(CheckpointError, match=r"k_proj: no tensor in the checkpoint"):
        method.process_weights_after_loading(layer)


def test_twice(checkpoint: Checkpoint) -> None:
    checkpoint.add(f"{ATTENTION}.o_proj", 64, 64, Recipe())
    layer = LinearBase()
    method = checkpoint.config().get_quant_method(layer, f"{ATTENTION}.o_proj")
    create(method, layer, 64, [64], (64, 64))
    checkpoint.hand_over(layer, f"{ATTENTION}.o_proj")
    with pytest.raises(CheckpointError, match="two tensors for one place"):
        checkpoint.hand_over(layer, f"{ATTENTION}.o_proj")


def test_unknown_shard_of_experts(checkpoint: Checkpoint) -> None:
    checkpoint.add_experts("model.experts", 1, 64, 64, Recipe())
    layer, _ = experts_layer(checkpoint, "model.experts", 1, range(1), 0, 1)
    method = checkpoint.config().get_quant_method(layer, "model.experts")
    method.create_weights(layer, 1, 64, 64, torch.float32)
    with pytest.raises(CheckpointError, match="does not know vLLM's shard 'gpt_oss_w2'"):
        checkpoint.hand_over_expert(layer, "model.experts.0.down_proj", "gpt_oss_w2", 0)


def test_unknown_activation(checkpoint: Checkpoint) -> None:
    checkpoint.add("model.experts.0.w1", 64, 64, Recipe())
    layer = RoutedExperts("model.experts", range(1), 1)
    layer.activation = SimpleNamespace(value="swiglustep", is_gated=True)
    method = checkpoint.config().get_quant_method(layer, "model.experts")
    with pytest.raises(NotImplementedError, match="swiglustep"):
        method.create_weights(layer, 1, 64, 64, torch.float32)


SIGNATURES = {
    "linear.GraftqLinearMethod.create_weights": "layer input_size_per_partition output_partition_sizes input_size "
    "output_size params_dtype extra_weight_attrs",
    "linear.GraftqLinearMethod.process_weights_after_loading": "layer",
    "linear.GraftqLinearMethod.apply": "layer x bias",
    "fused_moe.GraftqMoEMethod.create_weights": "layer num_experts hidden_size intermediate_size_per_partition "
    "params_dtype extra_weight_attrs",
    "fused_moe.GraftqMoEMethod.process_weights_after_loading": "layer",
    "fused_moe.GraftqMoEMethod.get_fused_moe_quant_config": "layer",
    "fused_moe.GraftqMoEMethod.apply": "layer x topk_weights topk_ids shared_experts shared_experts_input",
    "config.GraftqConfig.get_quant_method": "layer prefix",
    "config.GraftqConfig.maybe_update_config": "model_name hf_config revision",
    "config.GraftqConfig.apply_vllm_mapper": "hf_to_vllm_mapper",
}


@pytest.mark.parametrize("path", SIGNATURES)
def test_signatures_are_those_that_vllm_calls(path: str) -> None:
    module, owner, name = path.split(".")
    method = getattr(getattr(importlib.import_module(f"graftq.adapters.vllm.{module}"), owner), name)
    assert [parameter for parameter in inspect.signature(method).parameters if parameter != "self"] == SIGNATURES[
        path
    ].split()


def test_weight_mapper_keeps_g_idx() -> None:
    from graftq.adapters.vllm.config import GraftqConfig

    assert not vars(GraftqConfig.get_checkpoint_weight_mapper())
