"""From the tensors that SGLang hands over to packed layers, on plain tensors: parts, ranks, and what is refused."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.gptq import Recipe
from support.models import relative_error
from support.sglang_layers import (
    Checkpoint,
    answer,
    dispatched,
    experts_layer,
    hook,
    linear_layer,
    model_of,
)
from support.sglang_stand_in import FusedMoE, Group, LinearBase, ParallelLMHead, UnquantizedLinearMethod, installed

from graftq.quant_linear.errors import CheckpointError

ATTENTION, EXPERTS = "model.layers.0.self_attn", "model.layers.0.mlp.experts"
RECIPES = [Recipe(4), Recipe(3, 128, sym=False), Recipe(2, desc_act=False), Recipe(8, -1)]


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    monkeypatch.setenv("GRAFTQ_SGLANG", "all")
    with installed() as registered:
        importlib.import_module("graftq.adapters.sglang").register()
        yield registered


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return Checkpoint(tmp_path)


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize("ranks", [1, 2])
def test_queries_keys_and_values(recipe: Recipe, ranks: int, checkpoint: Checkpoint) -> None:
    sizes = {"q": 128, "k": 64, "v": 32}  # as where values have another head size
    for shard, size in sizes.items():
        checkpoint.add(f"{ATTENTION}.{shard}_proj", size, 256, recipe)
    config, x = checkpoint.config(), torch.randn(3, 256)
    own = [size // ranks for size in sizes.values()]
    by_rank = []
    for rank in range(ranks):
        layer = linear_layer(config, f"{ATTENTION}.qkv_proj", LinearBase(rank, ranks), (256, 256), own, ranks)
        for shard in ("v", "q", "k"):  # in any order
            checkpoint.hand_over(layer, f"{ATTENTION}.{shard}_proj", shard)
        by_rank.append(answer(layer, x).split(own, dim=-1))
    for index, shard in enumerate(sizes):
        found = torch.cat([parts[index] for parts in by_rank], dim=-1)
        assert relative_error(found, x @ checkpoint.weights[f"{ATTENTION}.{shard}_proj"].T) < 1e-5


@pytest.mark.parametrize("kv_ranks", [4, 2], ids=["heads shared by two ranks", "a group of their own"])
def test_keys_and_values_among_other_ranks(kv_ranks: int, checkpoint: Checkpoint) -> None:
    """Both ways two parts of keys and values: four ranks of which two share a head, or a group of two ranks."""
    for shard, size in {"q": 128, "k": 64, "v": 64}.items():
        checkpoint.add(f"{ATTENTION}.{shard}_proj", size, 64, Recipe())
    config, x = checkpoint.config(), torch.randn(2, 64)
    for rank in range(4):
        layer = LinearBase(rank, 4, num_kv_head_replicas=kv_ranks // 2)
        layer.kv_tp_group = layer.tp_group if kv_ranks == 4 else Group(rank % 2, 2)
        part = rank // 2 if kv_ranks == 4 else rank % 2
        linear_layer(config, f"{ATTENTION}.qkv_proj", layer, (64, 64), [32, 32, 32], 4)
        for shard in "qkv":
            checkpoint.hand_over(layer, f"{ATTENTION}.{shard}_proj", shard)
        rows = {"q": rank * 32, "k": part * 32, "v": part * 32}
        for found, (shard, start) in zip(answer(layer, x).split(32, dim=-1), rows.items(), strict=True):
            weight = checkpoint.weights[f"{ATTENTION}.{shard}_proj"][start : start + 32]
            assert relative_error(found, x @ weight.T) < 1e-5


@pytest.mark.parametrize("in_the_files", ["apart", "fused"])
def test_merged_columns_on_two_ranks(in_the_files: str, checkpoint: Checkpoint) -> None:
    name = "model.layers.0.mlp"
    shards = {"gate_proj": (0,), "up_proj": (1,)} if in_the_files == "apart" else {"gate_up_proj": ()}
    for own in shards:
        checkpoint.add(f"{name}.{own}", 128 // len(shards), 64, Recipe(3))
    config, x = checkpoint.config(), torch.randn(2, 64)
    expected = x @ torch.cat([checkpoint.weights[f"{name}.{own}"] for own in shards]).T
    parts = []
    for rank in range(2):
        layer = linear_layer(config, f"{name}.gate_up_proj", LinearBase(rank, 2), (64, 64), [32, 32], 2)
        for own, shard in shards.items():
            checkpoint.hand_over(layer, f"{name}.{own}", *shard)
        parts.append(answer(layer, x).split(32, dim=-1))
    assert relative_error(torch.cat([part for pair in zip(*parts, strict=True) for part in pair], -1), expected) < 1e-5


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_rows_on_two_ranks(recipe: Recipe, checkpoint: Checkpoint) -> None:
    name = f"{ATTENTION}.o_proj"
    checkpoint.add(name, 64, 320, recipe)  # 160 rows a rank: inside a group of 128
    config, x, total = checkpoint.config(), torch.randn(3, 320), torch.zeros(3, 64)
    for rank in range(2):
        layer = LinearBase(rank, 2)
        layer.quant_method = config.get_quant_method(layer, name)
        linear_layer(config, name, layer, (160, 320), [64])
        checkpoint.hand_over(layer, name)
        total += answer(layer, x[:, rank * 160 : (rank + 1) * 160])
    assert relative_error(total, x @ checkpoint.weights[name].T) < 1e-5


@pytest.mark.parametrize("rank", [0, 1])
def test_output_embedding_with_padding(rank: int, checkpoint: Checkpoint) -> None:
    checkpoint.add("lm_head", 100, 64, Recipe())
    start, stop = rank * 64, min(rank * 64 + 64, 100)
    indices = SimpleNamespace(org_vocab_start_index=start, org_vocab_end_index=stop)
    head = ParallelLMHead(rank, 2, org_vocab_size=100, shard_indices=indices)
    linear_layer(checkpoint.config(), "lm_head", head, (64, 64), [64], 2)
    checkpoint.hand_over(head, "lm_head")
    x = torch.randn(2, 64)
    expected = torch.nn.functional.pad(x @ checkpoint.weights["lm_head"][start:stop].T, (0, 64 - (stop - start)))
    torch.testing.assert_close(answer(head, x), expected)
    assert not hasattr(head, "weight")  # with one, SGLang would not ask the method


@pytest.mark.parametrize(
    ("ranks", "mine", "scaling"),
    [(1, range(3), None), (2, range(3), None), (1, range(1, 3), 2.5)],
    ids=["alone", "halves", "other experts elsewhere, scaled"],
)
def test_experts(ranks: int, mine: range, scaling: float | None, checkpoint: Checkpoint) -> None:
    """The ranks' parts add up; which inner features each has is theirs to choose."""
    checkpoint.add_experts(EXPERTS, 3, 96, 64, Recipe(3, 16))
    x, ids = torch.randn(4, 96), torch.tensor([[0, 1], [1, 2], [2, 0], [0, 1]], dtype=torch.int32)
    weights = torch.rand(4, 2)
    total = torch.zeros(4, 96)
    for rank in range(ranks):
        layer = experts_layer(checkpoint, EXPERTS, 3, mine, rank, ranks, routed_scaling_factor=scaling)
        total += layer.quant_method.apply(layer, dispatched(x, weights, ids, mine)).hidden_states
    expected = checkpoint.experts(EXPERTS, x, ids, weights, mine, slice(None)) * (scaling or 1)
    assert relative_error(total, expected) < 1e-5


def test_experts_by_a_shorter_name(checkpoint: Checkpoint) -> None:
    """SGLang's Mixtral leaves the first part out."""
    checkpoint.add_experts(EXPERTS, 1, 64, 64, Recipe())
    short = EXPERTS.removeprefix("model.")
    method = checkpoint.config().get_quant_method(FusedMoE(short, range(1), 1), short)
    assert method.names[0, "up_proj"] == f"{EXPERTS}.0.up_proj"


def test_rules_of_dynamic(checkpoint: Checkpoint) -> None:
    from graftq.adapters.sglang.config import GraftqConfig

    name = f"{ATTENTION}.o_proj"
    checkpoint.add(name, 64, 64, Recipe(8))
    checkpoint.write()
    config = GraftqConfig.from_config({**Recipe(4).config(), "dynamic": {r".*o_proj": {"bits": 8}}})
    config.locate(str(checkpoint.folder), {})
    layer, x = linear_layer(config, name, LinearBase(), (64, 64), [64]), torch.randn(2, 64)
    checkpoint.hand_over(layer, name)
    assert relative_error(answer(layer, x), x @ checkpoint.weights[name].T) < 1e-5


def test_files_decide_what_is_quantized(checkpoint: Checkpoint) -> None:
    checkpoint.add("model.layers.0.mlp.down_proj", 64, 64, Recipe())
    checkpoint.tensors["lm_head.weight"] = torch.zeros(8, 64)
    checkpoint.tensors[f"{ATTENTION}.q_proj.weight"] = torch.zeros(64, 64)
    config = checkpoint.config()
    assert isinstance(config.get_quant_method(LinearBase(), f"{ATTENTION}.qkv_proj"), UnquantizedLinearMethod)
    assert config.get_quant_method(ParallelLMHead(), "lm_head") is None
    assert config.get_quant_method(FusedMoE(EXPERTS, range(2), 2), EXPERTS) is None
    assert config.get_quant_method(torch.nn.Module(), "model.layers.0.mlp.down_proj") is None
    assert config.get_quant_method(LinearBase(), "model.layers.0.mlp.down_proj").names


def test_names_follow_the_model(checkpoint: Checkpoint) -> None:
    checkpoint.add("model.layers.0.mlp.down_proj", 64, 64, Recipe())
    config = checkpoint.config()
    renamed = SimpleNamespace(apply_list=lambda names: [name.replace("model.", "language.", 1) for name in names])
    config.apply_weight_name_mapper(renamed)
    assert config.projections("language.layers.0.mlp.down_proj") == ["model.layers.0.mlp.down_proj"]


def test_layers_that_a_model_keeps_plain_are_refused(checkpoint: Checkpoint) -> None:
    """SGLang's Mixtral gives its output embedding no configuration; it would stay as it was allocated."""
    checkpoint.add("lm_head", 64, 64, Recipe())
    checkpoint.add_experts("model.layers.1.mlp.experts", 1, 64, 64, Recipe())
    checkpoint.model["num_hidden_layers"] = 2
    config, check = checkpoint.config(), hook("loader._initialize_model")
    plain = model_of(model__layers__0__mlp__experts=FusedMoE(EXPERTS, range(1), 1), model__norm=torch.nn.LayerNorm(4))
    assert check(plain, None, None, config) is None
    with pytest.raises(CheckpointError, match=r"lm_head: packed, but SGLang's Module keeps lm_head unquantized"):
        check(model_of(lm_head=ParallelLMHead()), None, None, quant_config=config)
    prefix = "model.layers.1.mlp.experts"
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\.0\.\w+: packed, but SGLang's"):
        check(model_of(a__layers__1__experts=FusedMoE(prefix, range(1), 1)), None, None, config)
    assert check(model_of(lm_head=ParallelLMHead()), None, None, None) is None


DAMAGES = {
    "scales": (None, "o_proj: scales missing"),
    "g_idx": (lambda tensor: tensor + 2, r"o_proj\.g_idx: group 3 out of range"),
    "qzeros": (lambda tensor: tensor + 0x11111111, r"o_proj\.qzeros: labeled gptq, but"),
}


@pytest.mark.parametrize("suffix", DAMAGES)
def test_damage_is_named(suffix: str, checkpoint: Checkpoint) -> None:
    change, said = DAMAGES[suffix]
    name = f"{ATTENTION}.o_proj"
    checkpoint.add(name, 64, 64, Recipe())
    tensor = checkpoint.tensors.pop(f"{name}.{suffix}")
    if change is not None:
        checkpoint.tensors[f"{name}.{suffix}"] = change(tensor)
    with pytest.raises(CheckpointError, match=said) as caught:  # noqa: PT012 - some show before loading, some after
        layer = linear_layer(checkpoint.config(), name, LinearBase(), (64, 64), [64])
        checkpoint.hand_over(layer, name)
        answer(layer, torch.zeros(1, 64))
    assert caught.value.file == str(checkpoint.folder / "model.safetensors")


def test_a_running_engine_takes_no_other_weights(checkpoint: Checkpoint) -> None:
    name = f"{ATTENTION}.o_proj"
    checkpoint.add(name, 64, 64, Recipe())
    layer = linear_layer(checkpoint.config(), name, LinearBase(), (64, 64), [64])
    checkpoint.hand_over(layer, name)
    answer(layer, torch.zeros(1, 64))
    with pytest.raises(NotImplementedError, match="take no other weights"):
        layer.qweight.weight_loader(layer.qweight, checkpoint.tensors[f"{name}.qweight"])
    with pytest.raises(NotImplementedError, match="take no other weights"):
        layer.quant_method.restore_weights_before_loading(layer)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"activation": "gelu"}, "activation 'gelu'"),
        ({"gemm1_alpha": 1.702}, "activation 'silu', gemm1_alpha"),
        ({"num_fused_shared_experts": 1}, "--disable-shared-experts-fusion"),
        ({"no_combine": True}, "experts' outputs apart"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_experts_that_are_refused(changes: dict[str, Any], said: str, checkpoint: Checkpoint) -> None:
    checkpoint.add_experts(EXPERTS, 1, 64, 64, Recipe())
    with pytest.raises(NotImplementedError, match=said):
        experts_layer(checkpoint, EXPERTS, 1, range(1), **changes)


def test_experts_that_are_moved_are_refused(stand_in: SimpleNamespace, checkpoint: Checkpoint) -> None:
    checkpoint.add_experts(EXPERTS, 2, 64, 64, Recipe())
    where = SimpleNamespace(logical_to_all_physical=lambda layer, expert: [expert])
    stand_in.experts.metadata = where
    assert experts_layer(checkpoint, EXPERTS, 2, range(2)).graftq
    where.logical_to_all_physical = lambda layer, expert: [expert, 1 - expert]
    with pytest.raises(NotImplementedError, match="balance the load"):
        experts_layer(checkpoint, EXPERTS, 2, range(2))


def test_models_without_memory_are_refused(checkpoint: Checkpoint) -> None:
    checkpoint.add(f"{ATTENTION}.o_proj", 64, 64, Recipe())
    with pytest.raises(NotImplementedError, match="load_format"), torch.device("meta"):
        linear_layer(checkpoint.config(), f"{ATTENTION}.o_proj", LinearBase(), (64, 64), [64])
