"""Quantizing whole models through transformers' own door: what comes back runs, saves and loads as the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.gptq import dequantize
from support.models import CONFIGS, logits, relative_error, tiny
from transformers import AutoModelForCausalLM, GPTQConfig

from graftq.adapters.transformers.making import units
from graftq.adapters.transformers.making.blocks import check_chain, find_blocks
from graftq.adapters.transformers.making.calibration import batches, token_rows
from graftq.adapters.transformers.making.door import make, options_of
from graftq.adapters.transformers.making.options import Options
from graftq.adapters.transformers.making.report import Row, as_csv, worst
from graftq.quant_linear.experts import QuantExperts
from graftq.quant_linear.linear import QuantLinear
from graftq.quant_linear.making.moments import Moments

MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2": ("Gemma2Config", {"tie_word_embeddings": True}),
    "gemma3": ("Gemma3TextConfig", {"tie_word_embeddings": True, "sliding_window": 8, "num_hidden_layers": 3}),
    "olmoe": ("OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2}),
    "stablelm": ("StableLmConfig", {}),
    "phimoe": ("PhimoeConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}


def ids(rows: int = 12, length: int = 24) -> list[list[int]]:
    return torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(5)).tolist()


@pytest.fixture
def saved(tmp_path: Path):
    def save(name: str, **changes: Any) -> Path:
        model = tiny(name, **changes)
        model.save_pretrained(tmp_path / "float")
        return tmp_path / "float"

    return save


def quantized(folder: Path, **parameters: Any) -> Any:
    config = GPTQConfig(**{"bits": 4, "group_size": 32, "dataset": ids(), **parameters})
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)


def packed_names(model: Any) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, (QuantLinear, QuantExperts))}


@pytest.mark.parametrize("name", [*CONFIGS, *MORE])
def test_every_architecture(name: str, saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("support.models.CONFIGS", CONFIGS | MORE)
    folder = saved(name, **({"qk_rope_head_dim": 32, "head_dim": 32} if name == "deepseek_v3" else {}))
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = quantized(folder, bits=8)
    found = logits(model)
    assert relative_error(found, logits(plain)) < 0.03
    linear = [path for path, module in plain.named_modules() if type(module).__name__ in ("Linear", "Conv1D")]
    experts = [path for path, module in plain.named_modules() if hasattr(module, "is_transposed")]
    packed = packed_names(model)
    assert {path for path in linear if not path.endswith(("lm_head", "embed_out", "shared_expert_gate"))} <= packed
    assert set(experts) <= packed
    model.save_pretrained(tmp_path / "made")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "made", dtype=torch.float32)
    assert torch.equal(logits(again), found)
    again.save_pretrained(tmp_path / "again")
    first, second = (load_file(tmp_path / each / "model.safetensors") for each in ("made", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert relative_error(logits(model.dequantize()), found) < 1e-5


def test_a_checkpoint_says_how_it_was_made_and_not_with_what(saved, tmp_path: Path):
    model = quantized(saved("llama"), desc_act=True, damp_percent=0.05)
    model.save_pretrained(tmp_path / "made")
    for file in ("quantize_config.json", "config.json"):
        stated = json.loads((tmp_path / "made" / file).read_text())
        stated = stated.get("quantization_config", stated)
        wanted = {"bits": 4, "group_size": 32, "desc_act": True, "damp_percent": 0.05, "sym": True}
        assert wanted.items() <= stated.items()
        assert stated["checkpoint_format"] == "gptq"
        assert stated["meta"]["tokens"] == 12 * 24
        assert "dataset" not in stated
        assert "tokenizer" not in stated


def test_an_independent_reader_sees_the_same_weights(saved, tmp_path: Path):
    model = quantized(saved("mixtral"))
    model.save_pretrained(tmp_path / "made")
    state = load_file(tmp_path / "made" / "model.safetensors")
    stored = "model.layers.1.block_sparse_moe.experts.2."
    plain = model.dequantize().model.layers[1].mlp.experts
    for name, weight in (
        ("w1", plain.gate_up_proj[2, :96]),
        ("w3", plain.gate_up_proj[2, 96:]),
        ("w2", plain.down_proj[2]),
    ):
        tensors = (state[f"{stored}{name}.{suffix}"].numpy() for suffix in ("qweight", "qzeros", "scales", "g_idx"))
        assert torch.equal(dequantize(*tensors, bits=4), weight.detach())


def test_layers_with_the_same_inputs_share_the_act_order(saved, tmp_path: Path):
    model = quantized(saved("mixtral"), desc_act=True)
    model.save_pretrained(tmp_path / "made")
    state = load_file(tmp_path / "made" / "model.safetensors")
    for group in (
        [f"model.layers.0.self_attn.{name}_proj.g_idx" for name in "qkv"],
        [f"model.layers.0.block_sparse_moe.experts.1.{name}.g_idx" for name in ("w1", "w3")],
    ):
        orders = [state[name] for name in group]
        assert all(torch.equal(orders[0], order) for order in orders)
        assert not torch.equal(orders[0], torch.arange(64, dtype=torch.int32) // 32)


@pytest.mark.parametrize(
    "changes", [{"true_sequential": False}, {"desc_act": True}, {"act_group_aware": False}], ids=str
)
@pytest.mark.parametrize("parameters", [{"sym": False}, {"bits": 3}, {"group_size": -1}], ids=str)
def test_parameters(saved, tmp_path: Path, parameters: dict, changes: dict):
    model = quantized(saved("mixtral"), **parameters, **changes)
    found = logits(model)
    model.save_pretrained(tmp_path / "made")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "made", dtype=torch.float32)), found)


def test_a_head_on_request(saved, tmp_path: Path):
    folder = saved("llama")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plain = logits(model)
    make(model, ids(), None, Options(bits=8, group_size=32, lm_head=True))
    assert isinstance(model.lm_head, QuantLinear)
    found = logits(model)
    assert relative_error(found, plain) < 0.03
    model.save_pretrained(tmp_path / "made")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "made", dtype=torch.float32)), found)


def test_a_tied_head_is_refused(saved):
    model = AutoModelForCausalLM.from_pretrained(saved("gemma"), dtype=torch.float32)
    with pytest.raises(ValueError, match="lm_head: the output embedding is tied"):
        make(model, ids(), None, Options(group_size=32, lm_head=True))


def test_some_modules_only(saved, tmp_path: Path):
    folder = saved("mixtral")
    model = quantized(folder, modules_in_block_to_quantize=[["self_attn.q_proj"], ["mlp.experts"]])
    names = {name.partition("layers.0.")[2] for name in packed_names(model)} - {""}
    assert {name for name in names if "experts." not in name} == {"self_attn.q_proj", "mlp.experts"}
    model.save_pretrained(tmp_path / "made")
    rules = json.loads((tmp_path / "made" / "quantize_config.json").read_text())["dynamic"]
    assert r"-:^model\.layers\.0\.self_attn\.o_proj$" in rules
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "made", dtype=torch.float32)
    assert torch.equal(logits(again), logits(model))


def test_a_module_that_is_not_there_is_refused(saved):
    with pytest.raises(ValueError, match=r"self_attn\.x_proj: no such"):
        quantized(saved("llama"), modules_in_block_to_quantize=[["self_attn.q_proj", "self_attn.x_proj"]])


def test_shapes_that_cannot_be_stored_stay_float(saved, tmp_path: Path):
    folder = saved("llama", intermediate_size=80)
    with pytest.warns(UserWarning, match="6 layers stay float.*80 outputs: not multiples of 32"):
        model = quantized(folder)
    assert not any("mlp" in name for name in packed_names(model))
    model.save_pretrained(tmp_path / "made")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "made", dtype=torch.float32)
    assert torch.equal(logits(again), logits(model))


def test_few_tokens_are_told(saved):
    with pytest.warns(UserWarning, match="24 calibration tokens for layers of 96 inputs: take 1536 or more"):
        quantized(saved("mixtral"), dataset=ids(1))


def test_values_that_are_no_numbers_name_the_module(saved):
    model = AutoModelForCausalLM.from_pretrained(saved("llama"), dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 3] = torch.nan
    with pytest.raises(ValueError, match=r"model\.layers\.1: NaN"):
        make(model, ids(), None, Options(group_size=32))


def test_padding_never_counts(saved):
    folder = saved("mixtral")
    plain = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids()]
    padded = [{"input_ids": [*row, 0, 0, 0], "attention_mask": [1] * len(row) + [0] * 3} for row in ids()]
    nothing = {"input_ids": [0] * 9, "attention_mask": [0] * 9}
    one, two = quantized(folder, dataset=plain), quantized(folder, dataset=[nothing, *padded])
    assert torch.equal(logits(one), logits(two))


@pytest.mark.parametrize("true_sequential", [True, False], ids=["one after the other", "all at once"])
@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gpt_oss"])
def test_batches_that_wait_for_each_other_are_the_same_moments(
    name: str, true_sequential: bool, saved, monkeypatch: pytest.MonkeyPatch
):
    """As on a GPU; what was added to moments before weights changed is nothing else than what is added later."""
    folder, rows = saved(name), [*ids(4, 24), *ids(4, 20), *ids(4, 18), *ids(2, 7)]
    one = quantized(folder, dataset=rows, true_sequential=true_sequential)
    added: list[int] = []
    plain = Moments.add
    monkeypatch.setattr(Moments, "add", lambda self, x, *a, **k: added.append(len(x)) or plain(self, x, *a, **k))
    quantized(folder, dataset=rows, true_sequential=true_sequential)
    apart = len(added)
    monkeypatch.setattr(units, "AT_ONCE", {"cpu": 64 * 150})
    two = quantized(folder, dataset=rows, true_sequential=true_sequential)
    assert len(added) - apart < apart
    for before, after in zip(one.quantize_report, two.quantize_report, strict=True):
        assert (after.layer, after.tokens) == (before.layer, before.tokens)
        assert after.error == pytest.approx(before.error, rel=0.03)
    assert relative_error(logits(two), logits(one)) < 0.05


def test_without_a_dataset_the_error_says_so(saved):
    with pytest.raises(ValueError, match="no `dataset` to quantize it with"):
        quantized(saved("llama"), dataset=None)


def test_the_language_tower_of_a_vision_model(tmp_path: Path):
    text = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    )
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=95)
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    plain = logits(model)
    make(model, ids(), None, Options(bits=8, group_size=32))
    assert relative_error(logits(model), plain) < 0.03
    assert packed_names(model)
    assert not any("vision" in name or "projector" in name for name in packed_names(model))
    found = logits(model)
    model.save_pretrained(tmp_path / "made")
    again = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "made", dtype=torch.float32)
    assert torch.equal(logits(again), found)


def test_blocks_that_do_not_follow_each_other_are_refused():
    model = tiny("llama")
    last = model.model.layers[1]
    original = last.forward
    last.forward = lambda hidden, *args, **kwargs: original(hidden, *args, **kwargs) + len(calls)  # type: ignore
    calls: list[int] = []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match="do not give what the model gives"):
        check_chain(model, *find_blocks(model), torch.tensor([ids(1)[0]]))


def test_rows_of_any_form():
    class Tokenizer:
        def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
            return {"input_ids": [ord(letter) for letter in text]}

        def apply_chat_template(self, messages: list, tokenize: bool) -> str:
            return "".join(message["content"] for message in messages)

    data = ["abc", [1, 2], torch.tensor([[3, 4]]), {"text": "d"}, {"messages": [{"content": "e"}]}, {"input_ids": [5]}]
    rows = token_rows(data, Tokenizer(), longest=2)
    assert [row.tolist() for row in rows] == [[97, 98], [99], [1, 2], [3, 4], [100], [101], [5]]
    assert sum(map(len, token_rows(data, Tokenizer(), limit=4))) == 4
    assert sum(batch.numel() for batch in batches(rows)) == 10


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("a text", "a list is needed"),
        ([], "no token"),
        ([{"input_ids": [1, 2], "attention_mask": [0, 0]}], "no token"),
        ([{"words": 1}], "row 0 has neither"),
        ([[1], [0.5]], "row 1 is no text"),
        (["a text"], "need a tokenizer"),
    ],
    ids=["text", "empty", "all-padding", "other", "floats", "no-tokenizer"],
)
def test_calibration_data_that_is_none(data: Any, message: str):
    with pytest.raises(ValueError, match=message):
        token_rows(data)


def test_another_format_is_refused():
    with pytest.raises(ValueError, match="format='gptq_v2'"):
        options_of(GPTQConfig(bits=4, dataset=ids(), format="gptq_v2"))


def test_report():
    rows = [Row("a.b", 100, 0.5, 0.1, 0.0), Row("a.c", 3, 0.75, 0.1, 0.01)]
    assert as_csv(rows).splitlines() == ["layer,tokens,error,damp,clipped", "a.b,100,0.5,0.1,0", "a.c,3,0.75,0.1,0.01"]
    assert "fewer than 32 tokens" in worst(rows)
    assert worst(rows).splitlines()[1].endswith("a.c")


def test_the_configuration_keeps_what_only_graftq_knows():
    options = options_of(GPTQConfig(bits=4, dataset=ids(), lm_head=True, effort="high", static_groups=True))
    assert (options.lm_head, options.effort, options.static_groups) == (True, "high", True)
    with pytest.raises(ValueError, match="effort='most'"):
        options_of(GPTQConfig(bits=4, dataset=ids(), effort="most"))
