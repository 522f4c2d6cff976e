"""``generate`` of packed models that looks at each token one step late: everything it returns is as without that.

On a CPU nothing runs ahead of the host, but the same code can be made to run.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.generation.utils as utils
from support.loading import load
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

if not hasattr(utils, "DeferredStopCheck"):
    pytest.skip("transformers 5.17 and newer can defer the check", allow_module_level=True)

from graftq.adapters.transformers import generation

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EARLY = 7
"""New tokens of the sequence that ends first."""


class Event:
    """Of a CPU: what it is recorded after has happened."""

    def __init__(self, **arguments: Any):
        pass

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


class Collected(BaseStreamer):
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.has_ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.has_ended = True


class LongerThan(StoppingCriteria):
    """Stops each sequence at a length of its own."""

    def __init__(self, lengths: list[int]):
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return input_ids.shape[1] >= self.lengths.to(input_ids.device)


@pytest.fixture(scope="module")
def model(originals: dict[str, Path]) -> Any:
    return load(originals["mixtral"]).to(DEVICE)


@pytest.fixture
def deferred(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Switches deferring on, and gives the number of steps undone by each check that was deferred."""
    monkeypatch.setattr(generation, "DEVICES", {DEVICE})
    if DEVICE == "cpu":
        monkeypatch.setattr(torch, "Event", Event)
    checks: list[int] = []
    original = utils.DeferredStopCheck.finish

    def finish(self: Any) -> int:
        checks.append(original(self))
        return checks[-1]

    monkeypatch.setattr(utils.DeferredStopCheck, "finish", finish)
    return checks


def prompt() -> torch.Tensor:
    return torch.randint(3, 96, (2, 5), generator=torch.Generator().manual_seed(0)).to(DEVICE)


def generate(model: Any, **arguments: Any) -> Any:
    torch.manual_seed(3)
    inputs = prompt()
    arguments = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **arguments}
    return model.generate(inputs, attention_mask=torch.ones_like(inputs), **arguments)


def end_of(model: Any, **arguments: Any) -> int:
    """A token at which the first sequence ends in the middle of the batch."""
    return int(generate(model, **arguments)[0, prompt().shape[1] + EARLY - 1])


def both(monkeypatch: pytest.MonkeyPatch, call: Callable[[], Any]) -> tuple[Any, Any]:
    """What a call gives with deferring, and without."""
    found = call()
    with monkeypatch.context() as patch:
        patch.setattr(generation, "DEVICES", set())
        return found, call()


SAMPLED = {"do_sample": True, "temperature": 1.3, "top_k": 40}
CALLS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": SAMPLED,
    "dynamic cache": {"cache_implementation": "dynamic"},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "one token": {"max_new_tokens": 1},
    "two tokens": {"max_new_tokens": 2},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("arguments", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("ends", [False, True], ids=["to the end", "EOS in mid-batch"])
def test_tokens(
    arguments: dict[str, Any], ends: bool, model: Any, deferred: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    eos = [end_of(model, **{**arguments, "max_new_tokens": 16})] if ends else None
    deferred.clear()
    found, expected = both(monkeypatch, lambda: generate(model, **arguments, eos_token_id=eos))
    assert len(deferred) == 1
    assert torch.equal(found, expected)


@pytest.mark.parametrize("lengths", [[9, 9], [6, 12]], ids=["together", "one by one"])
@pytest.mark.parametrize("arguments", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_stopping_criteria(
    lengths: list[int], arguments: dict[str, Any], model: Any, deferred: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    criteria = StoppingCriteriaList([LongerThan(lengths)])
    found, expected = both(monkeypatch, lambda: generate(model, **arguments, stopping_criteria=criteria))
    assert deferred == [1]
    assert torch.equal(found, expected)


def test_what_is_sampled_next_has_the_same_random_numbers(
    model: Any, deferred: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    criteria = StoppingCriteriaList([LongerThan([9, 9])])

    def call() -> torch.Tensor:
        generate(model, **SAMPLED, stopping_criteria=criteria)
        return torch.rand(3, device=DEVICE)

    found, expected = both(monkeypatch, call)
    assert deferred == [1]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("ends", [False, True], ids=["to the end", "stopped"])
def test_streamer(ends: bool, model: Any, deferred: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    criteria = StoppingCriteriaList([LongerThan([9])] if ends else [])
    inputs = prompt()[:1]

    def call() -> Collected:
        streamer = Collected()
        model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=16,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            streamer=streamer,
            stopping_criteria=criteria,
        )
        return streamer

    found, expected = both(monkeypatch, call)
    assert len(deferred) == 1
    assert found.tokens == expected.tokens
    assert found.has_ended


def test_everything_returned(model: Any, deferred: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ("output_scores", "output_logits", "output_hidden_states")
    arguments = {**dict.fromkeys(wanted, True), "return_dict_in_generate": True}
    criteria = StoppingCriteriaList([LongerThan([9, 9])])
    found, expected = both(monkeypatch, lambda: generate(model, **arguments, stopping_criteria=criteria))
    assert deferred == [1]
    assert torch.equal(found.sequences, expected.sequences)
    assert found.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length()
    for kind in ("scores", "logits", "hidden_states"):
        assert len(found[kind]) == len(expected[kind]), kind
    assert torch.equal(torch.stack(found.scores), torch.stack(expected.scores))


OTHER_WAYS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
    "an assistant": {},
}


@pytest.mark.parametrize("way", OTHER_WAYS)
def test_other_ways_to_generate(
    way: str, model: Any, originals: dict[str, Path], deferred: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = OTHER_WAYS[way]
    if way == "an assistant":
        arguments = {"assistant_model": load(originals["mixtral"]).to(DEVICE)}
    inputs = prompt()[:1]
    defaults = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    call = lambda: model.generate(inputs, attention_mask=torch.ones_like(inputs), **defaults, **arguments)  # noqa: E731
    found, expected = both(monkeypatch, call)
    assert torch.equal(found, expected)
    assert not any(deferred)


def test_other_models_are_as_before(originals: dict[str, Path], model: Any, deferred: list[int]) -> None:
    plain = AutoModelForCausalLM.from_pretrained(originals["mixtral"].parent / "float").to(DEVICE)
    generate(plain)
    assert deferred == []
    generate(model)
    generate(plain)
    assert len(deferred) == 1


def test_a_call_that_fails_leaves_other_models_as_before(
    originals: dict[str, Path], model: Any, deferred: list[int]
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(originals["mixtral"].parent / "float").to(DEVICE)
    with pytest.raises(ZeroDivisionError):
        generate(model, stopping_criteria=[lambda *_, **__: 1 // 0])
    generate(plain)
    assert deferred == []


@pytest.mark.parametrize("is_packed", [True, False], ids=["packed", "another model"])
def test_a_static_cache_counts_where_the_model_is(
    is_packed: bool, originals: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(generation, "DEVICES", {"meta"})
    packed = load(originals["mixtral"])
    model = (packed if is_packed else type(packed)(packed.config)).to("meta")
    cache = model._prepare_static_cache("static", 1, 16, None, {})
    assert {layer.cumulative_length.device.type for layer in cache.layers} == {"meta" if is_packed else "cpu"}
