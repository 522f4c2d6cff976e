"""What programs import from ``auto_gptq.utils``."""

from __future__ import annotations

from typing import Any, NoReturn, TypeVar

Model = TypeVar("Model")

PEFT = "graftq leaves adapters to PEFT: peft.get_peft_model(model.model, peft.LoraConfig(...))"


def exllama_set_max_input_length(model: Model, max_input_length: int) -> Model:
    """Return the model as it is: graftq's kernels have no buffer that would limit the input's length."""
    return model


def get_gptq_peft_model(*args: Any, **kwargs: Any) -> NoReturn:
    """AutoGPTQ put LoRA layers of its own into the model."""
    raise NotImplementedError(PEFT)


class GPTQLoraConfig:
    """The configuration of AutoGPTQ's LoRA layers."""

    def __init__(self, *args: Any, **kwargs: Any):
        raise NotImplementedError(PEFT)
