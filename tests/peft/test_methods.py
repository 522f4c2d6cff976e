"""PEFT's methods on packed layers: what each does to the float model, or a refusal by name; docs have the table."""

from __future__ import annotations

import copy
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, XLoraConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, LoraGAConfig, MontecloraConfig, VeloraConfig
from peft.utils.peft_types import PeftType
from support.checkpoints import write_pair
from support.gptq import Recipe
from support.loading import load
from support.models import logits, relative_error, tiny

from graftq.adapters.peft.methods import WORKS
from graftq.quant_linear.linear import QuantLinear

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # PEFT's, about settings that suit models of any real size
    # transformers 5.23 renames it; PEFT, the Trainer of 5.16 and most users' code do not know yet.
    pytest.mark.filterwarnings(r"ignore:`\w*gradient_checkpointing\w*` is deprecated"),
]

TABLE = Path(__file__).parents[2] / "docs" / "after_loading.md"

SETTINGS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10, "tinit": 1, "tfinal": 1, "init_r": 4},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 16},
    "FOURIERFT": {"n_frequency": 20},
    "IA3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "OFT": {"oft_block_size": 4, "r": 0},
    "TINYLORA": {"r": 2},
    "VBLORA": {"vector_length": 8, "num_vectors": 16, "topk": 2},
    "WAVEFT": {"n_frequency": 20},
}
BESIDE: dict[str, dict[str, Any]] = {
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": list(range(3, 96))},
    "PROMPT_TUNING": {"num_virtual_tokens": 4},
    "P_TUNING": {"num_virtual_tokens": 4, "encoder_hidden_size": 16},
    "PREFIX_TUNING": {"num_virtual_tokens": 4},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 1, "target_modules": None},
}
"""Methods that put nothing around linear layers."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pair(tmp_path_factory.mktemp("llama"), tiny("llama", num_hidden_layers=1), Recipe())


@pytest.fixture(scope="module")
def packed(checkpoint: Path) -> Any:
    return load(checkpoint)


@pytest.fixture(scope="module")
def plain(checkpoint: Path) -> Any:
    return load(checkpoint).dequantize()


def config(method: str, **changes: Any) -> Any:
    kind = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method)]
    usual = {"target_modules": ["q_proj", "down_proj"], "r": 4, "task_type": "CAUSAL_LM"}
    settings = {**usual, **SETTINGS.get(method, {}), **BESIDE.get(method, {}), **changes}
    known = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in settings.items() if name in known and value is not None})


def adapted(model: Any, config: Any) -> Any:
    """A copy with adapters that do something, the same ones whatever is below them."""
    torch.manual_seed(0)
    made = get_peft_model(copy.deepcopy(model), copy.deepcopy(config)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in sorted(made.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return made


def gradients(model: Any) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 96, (2, 11), generator=torch.Generator().manual_seed(1))
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: tensor.grad for name, tensor in model.named_parameters() if tensor.grad is not None}


def assert_alike(found: Any, expected: Any, bare: Any) -> None:
    """The same logits and gradients, and not those of the model without adapters."""
    assert relative_error(logits(found), logits(expected)) < 1e-5
    if logits(found).shape == logits(bare).shape:
        assert relative_error(logits(found), logits(bare)) > 1e-4
    mine, theirs = gradients(found), gradients(expected)
    assert mine.keys() == theirs.keys() != set()
    whole = [torch.cat([gradient.flatten() for gradient in each.values()]) for each in (mine, theirs)]
    assert relative_error(*whole) < 1e-4


@pytest.mark.parametrize("method", WORKS)
def test_around_packed_layers(method: str, packed: Any, plain: Any) -> None:
    found = adapted(packed, config(method))
    assert_alike(found, adapted(plain, config(method)), plain)
    assert all(type(module) is QuantLinear for module in found.modules() if isinstance(module, QuantLinear))
    with pytest.raises(ValueError, match=r"cannot be merged into packed weights|Cannot merge \w+ layers"):
        found.merge_and_unload()
    with pytest.raises(ValueError, match="cannot be merged into packed weights"):
        found.base_model.model.model.layers[0].mlp.down_proj.merge()
    assert logits(found.unload()).equal(logits(packed))


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # PEFT's, with transformers 5.24
@pytest.mark.parametrize("method", BESIDE)
def test_beside_packed_layers(method: str, packed: Any, plain: Any) -> None:
    found, expected = adapted(packed, config(method)), adapted(plain, config(method))
    if "num_virtual_tokens" in BESIDE[method]:
        assert relative_error(logits(found), logits(expected)) < 1e-5
    else:
        assert_alike(found, expected, plain)


@pytest.mark.parametrize("method", ["GLORA", "POLY"])
def test_methods_that_are_not_known_to_be_right(method: str, packed: Any) -> None:
    with pytest.raises(ValueError, match=rf"layers\.0\.self_attn\.q_proj: {method} is not known to be right on packed"):
        adapted(packed, config(method))
    assert logits(packed).isfinite().all()


@pytest.mark.parametrize("method", ["LOHA", "IA3"])
def test_experts_have_lora_alone(method: str, tmp_path: Path) -> None:
    model = load(write_pair(tmp_path, tiny("mixtral", num_hidden_layers=1), Recipe()))
    targets = {"target_modules": r".*\.experts", "feedforward_modules": None}
    with pytest.raises(ValueError, match=rf"experts: {method} is not known to be right on packed experts.*LORA"):
        get_peft_model(model, config(method, **targets))


def test_stored_and_loaded_by_either(packed: Any, plain: Any, tmp_path: Path) -> None:
    for method in ("VERA", "LOKR", "OFT", "IA3"):
        found = adapted(packed, config(method))
        found.save_pretrained(tmp_path / method)
        for base in (packed, plain):
            again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / method)
            assert relative_error(logits(again), logits(found)) < 1e-5
        found.get_base_model().dequantize()
        assert relative_error(logits(found.merge_and_unload()), logits(again)) < 1e-5


def test_two_methods_in_turn(packed: Any, plain: Any) -> None:
    found, expected = adapted(packed, config("LOHA")), adapted(plain, config("LOHA"))
    for model in (found, expected):
        torch.manual_seed(5)
        model.add_adapter("second", config("LOHA", init_weights=False))
        model.set_adapter("second")
    assert relative_error(logits(found), logits(expected)) < 1e-5


LORA: dict[str, dict[str, Any]] = {
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "aLoRA": {"alora_invocation_tokens": [5]},
    "BD-LoRA": {
        "use_bdlora": BdLoraConfig(target_modules_bd_a=["q_proj"], target_modules_bd_b=["down_proj"], nblocks=2)
    },
    "VeLoRA": {"velora_config": VeloraConfig()},
    "MonteCLoRA": {"monteclora_config": MontecloraConfig()},
    "bias of the adapter's own": {"lora_bias": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "EVA": {"init_lora_weights": "eva"},
    "trained tokens": {"trainable_token_indices": list(range(3, 96))},
    "head trained as a whole": {"modules_to_save": ["lm_head"]},
    "layers repeated": {"layer_replication": [(0, 1), (0, 1)]},
}


@pytest.mark.parametrize("what", LORA)
def test_variants_of_lora(what: str, packed: Any, plain: Any) -> None:
    settings = config("LORA", **LORA[what])
    found, expected = adapted(packed, settings), adapted(plain, settings)
    if what == "aLoRA":  # works from a sequence of tokens on, which must be there
        ids = torch.tensor([[7, 5, 9, 11, 3]])
        first, second = (model(ids).logits.detach() for model in (found, expected))
        assert relative_error(first, second) < 1e-5
        assert relative_error(first, packed(ids).logits.detach()) > 1e-4
    else:
        assert_alike(found, expected, plain)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes"),
    "fast PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' changes"),
    "OLoRA": ({"init_lora_weights": "olora"}, "init_lora_weights='olora' changes"),
    "CorDA": ({"init_lora_weights": "corda"}, "init_lora_weights='corda' changes"),
    "MiCA": ({"init_lora_weights": "mica"}, "init_lora_weights='mica' changes"),
    "LoRA-GA": ({"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()}, "'lora_ga' changes"),
    "KaSA": ({"kasa_config": KasaConfig()}, "kasa_config.*on packed layers these are right: use_dora"),
    "QA-LoRA": ({"use_qalora": True}, "use_qalora"),
    "a packed layer trained as a whole": (
        {"modules_to_save": ["o_proj"]},
        r"modules_to_save names QuantLinear\(64, 64",
    ),
    "a module that holds packed layers": ({"modules_to_save": ["mlp"]}, "or a module that holds it"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_would_change_packed_weights(what: str, packed: Any) -> None:
    changes, message = REFUSED[what]
    if what == "a module that holds packed layers":
        changes = {**changes, "target_modules": ["q_proj"]}
    with pytest.raises(ValueError, match=message):
        adapted(packed, config("LORA", **changes))


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_of_packed_layers_are_not_trained(bias: str, tmp_path: Path) -> None:
    model = load(write_pair(tmp_path, tiny("qwen2", num_hidden_layers=1), Recipe()))
    with pytest.raises(ValueError, match=f"bias='{bias}' would train a packed layer's bias"):
        get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["q_proj"], bias=bias))
    get_peft_model(model, LoraConfig(target_modules=["o_proj"], bias=bias))


def test_a_mixture_of_adapters(packed: Any, plain: Any, tmp_path: Path) -> None:
    for number in "01":
        torch.manual_seed(int(number))
        get_peft_model(copy.deepcopy(plain), config("LORA", init_lora_weights=False)).save_pretrained(tmp_path / number)
    adapters = {number: str(tmp_path / number) for number in "01"}
    settings = XLoraConfig(task_type="CAUSAL_LM", hidden_size=64, xlora_depth=1, adapters=adapters)
    models = []
    for base in (packed, plain):
        base = copy.deepcopy(base)
        base.config.use_cache = False
        torch.manual_seed(0)
        models.append(get_peft_model(base, settings).eval())
    assert relative_error(logits(models[0]), logits(models[1])) < 1e-5


def test_the_table_in_the_docs_names_every_method() -> None:
    rows = re.findall(r"^\| ([^|]+) \| (works|refused by name) \|$", TABLE.read_text(encoding="utf-8"), re.MULTILINE)
    said = {name: verdict for names, verdict in rows for name in re.findall(r"`([A-Z0-9_]+)`", names)}
    assert {name for name, verdict in said.items() if verdict == "works"} == {"LORA", "XLORA", *WORKS, *BESIDE}
    inputs_alone = {"CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING"}  # kinds of prompts, which meet no layer
    assert {method.value for method in PEFT_TYPE_TO_CONFIG_MAPPING} == said.keys() | inputs_alone
