"""What the server asks of its loader, layers and fallback, asked by stand-ins with its signatures."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import edit, edit_config, write_pair
from support.gptq import Recipe
from support.models import relative_error, tiny
from tgi.standins import Group, Weights, installed
from torch.nn import functional

from graftq.adapters.tgi.routing import choose_experts
from graftq.quant_linear.errors import CheckpointError

Server = Mapping[str, ModuleType]
ATTENTION = "model.layers.0.self_attn"
MLP = "model.layers.0.mlp"
EXPERTS = "model.layers.0.block_sparse_moe.experts"
RECIPES = {
    "3-bit": Recipe(bits=3, group_size=32),
    "4-bit, own order for each": Recipe(),
    "8-bit, one group": Recipe(bits=8, group_size=-1),
    "2-bit asymmetric v2 in order": Recipe(bits=2, desc_act=False, sym=False, checkpoint_format="gptq_v2"),
}


@pytest.fixture(scope="module", params=RECIPES)
def llama(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pair(tmp_path_factory.mktemp("llama"), tiny("llama"), RECIPES[request.param])


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pair(tmp_path_factory.mktemp("mixtral"), tiny("mixtral"), Recipe(bits=3, zero_bias=True))


@pytest.fixture
def changed(tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    return write_pair(tmp_path, tiny("llama"), Recipe(zero_bias=True))


def make_loader(server: Server, model: Path, quantize: str = "gptq", quant_method: str = "gptq") -> Any:
    server["text_generation_server.utils.quantization"]._get_quantizer_config(str(model), None)
    return server["text_generation_server.layers.gptq"].GPTQWeightsLoader(
        bits=4,
        desc_act=False,
        groupsize=-1,
        quant_method=quant_method,
        quantize=quantize,
        sym=False,
        modules_to_not_convert=[],
    )


def open_weights(server: Server, model: Path, group: Group | None = None) -> Weights:
    return Weights(model / "model.safetensors", make_loader(server, model), group or Group())


def twin(model: Path) -> dict[str, torch.Tensor]:
    return load_file(model.parent / "float" / "model.safetensors")


def shards(count: int) -> list[Group]:
    return [Group(rank, count) for rank in range(count)]


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.shape == expected.shape and relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("count", [1, 2])
def test_columns_of_several_projections(llama: Path, count: int) -> None:
    names = [f"{ATTENTION}.{one}_proj" for one in "qkv"]
    x, float_weights = torch.randn(5, 64), twin(llama)
    with installed(llama) as server:
        for group in shards(count):
            weights = open_weights(server, llama, group)
            found = weights.loader.get_multi_weights_col(weights, names, 0).get_linear(None)(x)
            own = torch.cat([weights.share(float_weights[f"{name}.weight"], 0) for name in names])
            assert close(found, functional.linear(x, own))


@pytest.mark.parametrize("count", [1, 2])
def test_rows_add_up(llama: Path, count: int) -> None:
    x = torch.randn(5, 96)
    with installed(llama) as server:
        found = torch.zeros(5, 64)
        for group in shards(count):
            weights = open_weights(server, llama, group)
            layer = weights.loader.get_weights_row(weights, f"{MLP}.down_proj").get_linear(None)
            found += layer(weights.share(x, 1))
    assert close(found, functional.linear(x, twin(llama)[f"{MLP}.down_proj.weight"]))


def test_auto_round(changed: Path) -> None:
    stated = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}
    edit_config(changed, **stated, desc_act=None, checkpoint_format=None)
    name, x = f"{MLP}.up_proj", torch.randn(5, 64)
    with installed(changed) as server:
        weights = Weights(
            changed / "model.safetensors", make_loader(server, changed, quant_method="auto-round"), Group()
        )
        layer = weights.loader.get_weights(weights, name).get_linear(None)
    assert close(layer(x), functional.linear(x, twin(changed)[f"{name}.weight"]))


def test_auto_rounds_other_packings(changed: Path) -> None:
    edit_config(changed, quant_method="auto-round", packing_format="auto_round:auto_awq")
    with installed(changed) as server, pytest.raises(CheckpointError, match="AWQ's packing"):
        make_loader(server, changed, quant_method="auto-round")


@pytest.mark.parametrize("count", [1, 2])
def test_columns_of_a_packed_projection(count: int, tmp_path: Path) -> None:
    model = write_pair(tmp_path, tiny("phi3", num_key_value_heads=4), Recipe())
    name, x = f"{ATTENTION}.qkv_proj", torch.randn(5, 64)
    q, k, v = twin(model)[f"{name}.weight"].chunk(3)
    with installed(model) as server:
        for group in shards(count):
            weights = open_weights(server, model, group)
            layer = weights.loader.get_weights_col_packed(weights, name, [4, 4, 4]).get_linear(None)
            own = torch.cat([weights.share(one, 0) for one in (q, k, v)])
            assert close(layer(x), functional.linear(x, own))


@pytest.mark.parametrize("count", [1, 2])
def test_heads_of_gpt_neox(count: int, tmp_path: Path) -> None:
    """The files have query, key and value of one head after those of another; the server wants all queries first."""
    model = write_pair(tmp_path, tiny("phi3", num_key_value_heads=4), Recipe())
    name, x = f"{ATTENTION}.qkv_proj", torch.randn(5, 64)
    with installed(model) as server:
        load_qkv = server["text_generation_server.models.custom_modeling.flash_neox_modeling"].load_qkv
        for group in shards(count):
            weights = open_weights(server, model, group)
            layer = load_qkv(None, name, weights, num_heads=4 // count, head_size=16, hidden_size=64)
            own = weights.share(twin(model)[f"{name}.weight"], 0).view(-1, 3, 16, 64).transpose(0, 1).flatten(0, 2)
            assert close(layer(x), functional.linear(x, own))


def test_biases_go_where_their_outputs_are(tmp_path: Path) -> None:
    model = write_pair(tmp_path, tiny("qwen2"), Recipe())
    names, x, state = [f"{ATTENTION}.{one}_proj" for one in "qkv"], torch.randn(5, 64), twin(model)
    bias = torch.cat([state[f"{name}.bias"] for name in names])
    with installed(model) as server:
        weights = open_weights(server, model)
        found = weights.loader.get_multi_weights_col(weights, names, 0)
        expected = functional.linear(x, torch.cat([state[f"{name}.weight"] for name in names]), bias)
        assert close(found.get_linear(bias)(x), expected)
        with pytest.raises(CheckpointError, match=r"q_proj\.bias: non-zero bias, but the model's layer has none"):
            found.get_linear(None)


def test_the_files_decide_what_is_quantized(tmp_path: Path) -> None:
    def choose(name: str) -> Recipe | None:
        return None if name.endswith("k_proj") else Recipe()

    model = write_pair(tmp_path, tiny("llama"), Recipe(), overrides=choose, dynamic={"-:.*k_proj": {}})
    names, x, state = [f"{ATTENTION}.{one}_proj" for one in "qkv"], torch.randn(5, 64), twin(model)
    with installed(model) as server:
        weights = open_weights(server, model)
        found = weights.loader.get_multi_weights_col(weights, names, 0).get_linear(None)(x)
        assert close(found, functional.linear(x, torch.cat([state[f"{name}.weight"] for name in names])))
        plain = weights.loader.get_weights_row(weights, names[1])
        assert plain.weight.equal(state[f"{names[1]}.weight"])


@pytest.mark.parametrize("count", [1, 2])
def test_experts(mixtral: Path, count: int) -> None:
    x, logits = torch.randn(7, 64), torch.randn(7, 4)
    arguments = {
        "n_expert_group": None,
        "n_experts": 4,
        "prefix": EXPERTS,
        "renormalize": True,
        "topk": 2,
        "topk_group": None,
        "gate_proj_name": "w1",
        "up_proj_name": "w3",
        "down_proj_name": "w2",
    }
    with installed(mixtral) as server:
        layer_class = server["text_generation_server.layers.moe"].SparseMoELayer
        found = torch.zeros(7, 64)
        for group in shards(count):
            weights = open_weights(server, mixtral, group)
            assert layer_class.is_supported(weights)
            found += layer_class(weights=weights, **arguments)(x, gating_output=logits)
    assert close(found, run_experts(x, twin(mixtral), *choose_experts(logits, top_k=2, renormalize=True)))


def run_experts(
    x: torch.Tensor, state: Mapping[str, torch.Tensor], index: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    out = torch.zeros_like(x)
    for token, chosen in enumerate(index.tolist()):
        for slot, expert in enumerate(chosen):
            gate, up, down = (state[f"{EXPERTS}.{expert}.{name}.weight"] for name in ("w1", "w3", "w2"))
            hidden = functional.silu(gate @ x[token]) * (up @ x[token])
            out[token] += weights[token, slot] * (down @ hidden)
    return out


def test_experts_left_out_of_quantisation_stay_the_servers(tmp_path: Path) -> None:
    model = write_pair(tmp_path, tiny("mixtral"), Recipe(), only=r"[qkvo]_proj$")
    with installed(model) as server:
        weights = open_weights(server, model)
        layer_class = server["text_generation_server.layers.moe"].SparseMoELayer
        layer = layer_class(prefix=EXPERTS, weights=weights, gate_proj_name="w1")
        assert layer.moe == "stock, HybridFP8UnquantLoader"


@pytest.mark.parametrize("quantize", ["gptq", "awq"])
def test_what_is_not_gptq_is_left_alone(quantize: str, llama: Path) -> None:
    with installed(llama) as server:
        loader = make_loader(server, llama, quantize, "awq")
        weights = Weights(llama / "model.safetensors", loader)
        assert loader.get_weights(weights, MLP) == loader.get_weights_row(weights, MLP) == "stock"
        assert loader.get_multi_weights_col(weights, [MLP], 0) == loader.get_weights_col(weights, MLP) == "stock"
        assert loader.get_weights_col_packed(weights, MLP, 2) == "stock"
        moe = server["text_generation_server.layers.moe"].SparseMoELayer
        assert not moe.is_supported(weights)
        assert moe(prefix=EXPERTS, weights=weights).moe == "stock, GPTQWeightsLoader"
        allowed = server["text_generation_server.utils.quantization"].can_use_gptq_marlin
        assert allowed(bits=4, groupsize=128, quant_method="awq", quantize=quantize, sym=True)
        assert not allowed(bits=4, groupsize=128, quant_method="gptq", quantize="gptq", sym=True)


def test_the_loader_is_still_the_servers_class(llama: Path) -> None:
    with installed(llama) as server:
        ours = server["text_generation_server.layers.gptq"].GPTQWeightsLoader
        assert ours.__name__ == "GPTQWeightsLoader"
        stock = ours.__mro__[2]
        assert isinstance(make_loader(server, llama), stock)
    assert server["text_generation_server.layers.gptq"].GPTQWeightsLoader is stock


def _put(state: dict[str, torch.Tensor], name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    state[name] = change(state[name])


def _set_depth(model: Path, layers: int) -> None:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": layers}))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "configuration": (lambda model: edit_config(model, bits="four"), r"config\.json: bits is 'four'"),
    "bits": (lambda model: edit_config(model, bits=8), r"q_proj: .*says 8 bits, .*the tensors show 4"),
    "scales": (
        lambda model: edit(model, lambda state: state[f"{ATTENTION}.q_proj.scales"].fill_(float("inf"))),
        r"q_proj\.scales: infinite values",
    ),
    "qweight missing": (
        lambda model: edit(model, lambda state: state.pop(f"{ATTENTION}.q_proj.qweight")),
        r"q_proj: qweight missing",
    ),
    "projection missing": (
        lambda model: edit(
            model, lambda state: [state.pop(name) for name in list(state) if name.startswith(f"{ATTENTION}.q_proj")]
        ),
        r"q_proj\.weight: no tensor in the checkpoint for this weight",
    ),
    "file truncated": (
        lambda model: (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-64]),
        r"model\.safetensors: truncated",
    ),
    "8-bit floats": (
        lambda model: edit(model, lambda state: _put(state, "lm_head.weight", lambda t: t.to(torch.float8_e4m3fn))),
        r"lm_head\.weight: dtype F8_E4M3, which nothing here reads",
    ),
    "packed and plain": (
        lambda model: edit(model, lambda state: state.update({f"{ATTENTION}.q_proj.weight": torch.zeros(64, 64)})),
        r"q_proj: both packed and as a plain weight",
    ),
    "scales too large": (
        lambda model: edit(model, lambda state: _put(state, f"{ATTENTION}.q_proj.scales", lambda t: t.float() + 1e20)),
        r"q_proj\.scales: scales up to 1e\+20 overflow",
    ),
    "too few layers": (
        lambda model: _set_depth(model, 1),
        r"layers\.1\..*: packed, but the model has no place for it",
    ),
    "no parameters": (
        lambda model: [(model / name).write_text("{}") for name in ("config.json", "quantize_config.json")],
        r"packed weights, but there is no quantize_config\.json",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named(what: str, changed: Path) -> None:
    damage, message = DAMAGE[what]
    damage(changed)
    with installed(changed) as server, pytest.raises(CheckpointError, match=message):
        load_one(server, changed)


def load_one(server: Server, model: Path) -> Any:
    loader = make_loader(server, model)
    return loader.get_multi_weights_col(Weights(model / "model.safetensors", loader), [f"{ATTENTION}.q_proj"], 0)


def test_a_share_that_cannot_be_is_refused(changed: Path) -> None:
    with installed(changed) as server:
        weights = open_weights(server, changed, Group(0, 5))
        with pytest.raises(ValueError, match=r"q_proj: 64 cannot be divided among 5 shards"):
            weights.loader.get_weights_col(weights, f"{ATTENTION}.q_proj")


@pytest.mark.parametrize(
    ("changes", "taken"),
    [({}, True), ({"checkpoint_format": "gptq_v2"}, False), ({"bits": 8}, False)],
    ids=["4 bits v1", "v2", "8 bits"],
)
def test_santacoders_own_loading(changes: dict[str, Any], taken: bool, changed: Path) -> None:
    edit_config(changed, **changes)
    with installed(changed) as server:
        loader = make_loader(server, changed)
        weights = Weights(changed / "model.safetensors", loader)
        if taken:
            loader._get_gptq_params(weights)
        else:
            with pytest.raises(CheckpointError, match=r"c_attn as 4 bits and gptq \(v1\)"):
                loader._get_gptq_params(weights)


def test_parameters_among_the_tensors(changed: Path) -> None:
    def state_them(state: dict[str, torch.Tensor]) -> None:
        state.update(gptq_bits=torch.tensor(4), gptq_groupsize=torch.tensor(32), gptq_sym=torch.tensor(True))

    edit(changed, state_them)
    for name in ("config.json", "quantize_config.json"):
        (changed / name).write_text("{}")
    with installed(changed) as server:
        weights = open_weights(server, changed)
        layer = weights.loader.get_weights(weights, f"{MLP}.up_proj").get_linear(None)
        x = torch.randn(3, 64)
        assert close(layer(x), functional.linear(x, twin(changed)[f"{MLP}.up_proj.weight"]))


@pytest.fixture
def fallback(changed: Path) -> Iterator[Callable[..., Any]]:
    with installed(changed) as server:
        yield server["text_generation_server.models.causal_lm"].CausalLM.fallback


def test_fallback_lets_transformers_load_gptq(fallback: Callable[..., Any]) -> None:
    model = fallback("model", "main", quantize="gptq", dtype=torch.float16, trust_remote_code=True)
    assert model.quantize == "gptq"
    expected = torch.float16 if torch.cuda.is_available() else None  # the server's own choice for CPUs
    assert model.seen == ("model", "main", None, expected, True)
    assert fallback("model", quantize="gptq", dtype=torch.bfloat16).seen[3] is torch.bfloat16


@pytest.mark.parametrize("quantize", [None, "bitsandbytes", "awq"])
def test_fallback_of_anything_else_is_the_servers(quantize: str | None, fallback: Callable[..., Any]) -> None:
    assert fallback("model", quantize=quantize, dtype=torch.float16).seen == (
        "model",
        None,
        quantize,
        torch.float16,
        False,
    )
