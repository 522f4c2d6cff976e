"""LoRA on the real Mixtral, attention and experts, as users train it: on the CPU's kernels and on a GPU's."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.loading import load
from support.models import relative_error
from support.training import PLACES, REAL, rows_of_text
from transformers import Trainer, TrainingArguments

peft = pytest.importorskip("peft", minversion="0.21")

pytestmark = [
    # PEFT's own: it converts the old names of Mixtral's experts to patterns that it then looks for among modules alone.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys"),
    # transformers 5.23 renames it; PEFT, the Trainer of 5.16 and most users' code do not know yet.
    pytest.mark.filterwarnings(r"ignore:`\w*gradient_checkpointing\w*` is deprecated"),
]

# In half precision, rounding sends some tokens to other experts.
LIMIT = {torch.float32: 1e-5, torch.float16: 5e-2, torch.bfloat16: 5e-2}


def train(model: Any, rows: torch.Tensor, folder: Path, dtype: torch.dtype) -> list[dict[str, float]]:
    """What the Trainer logs of each step, with checkpointing and accumulation."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        num_train_epochs=3,
        learning_rate=5e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        use_cpu=model.device.type == "cpu",
        bf16=dtype == torch.bfloat16,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=[{"input_ids": row, "labels": row} for row in rows])
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def answers(model: Any, rows: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=rows.to(model.device)).logits.float()


@PLACES
def test_trained_and_merged(device: str, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    rows = rows_of_text(8, 32)
    base = load(REAL, dtype=dtype, device_map=device)
    base = peft.prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": False})
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "w1", "w2", "w3"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config)
    steps = train(model, rows, tmp_path, dtype)
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.2
    assert all(math.isfinite(step["grad_norm"]) for step in steps)
    assert {"adapter_model.safetensors"} <= {path.name for path in next(tmp_path.glob("checkpoint-*")).iterdir()}
    assert not any(p.grad is not None for n, p in model.named_parameters() if "lora" not in n)

    trained = answers(model.eval(), rows)
    model.get_base_model().dequantize()
    dense, merged = answers(model, rows), answers(model.merge_and_unload(), rows)
    assert relative_error(dense, trained) < LIMIT[dtype]
    assert relative_error(merged, trained) < LIMIT[dtype]
