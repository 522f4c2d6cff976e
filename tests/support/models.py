"""Tiny random models of the architectures that the tests load."""

from __future__ import annotations

from typing import Any

import torch
import transformers

COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE: dict[str, Any] = {"moe_intermediate_size": 32, "num_experts_per_tok": 2, "num_experts": 4}
LATENT: dict[str, Any] = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "phi3": ("Phi3Config", {"pad_token_id": 0}),
    "gemma": ("GemmaConfig", {"tie_word_embeddings": True}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "falcon": ("FalconConfig", {"new_decoder_architecture": True, "num_kv_heads": 2, "head_dim": None}),
    "gpt2": ("GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("Qwen2MoeConfig", {**MOE, "shared_expert_intermediate_size": 64}),
    "qwen3_moe": ("Qwen3MoeConfig", MOE),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            **{k: v for k, v in MOE.items() if k != "num_experts"},
            **LATENT,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
    ),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64}),
}
DENSE = ("llama", "mistral", "qwen2", "phi3", "gemma", "gpt2")
EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss")


def tiny(name: str, seed: int = 0, **changes: Any) -> Any:
    """A random float32 model; biases and norms random too, so that nothing hides behind zeros and ones.

    ``changes`` are made to its configuration; None leaves transformers' own default.
    """
    class_name, extra = CONFIGS[name]
    settings = {**COMMON, **extra, **changes}
    config = getattr(transformers, class_name)(**{key: value for key, value in settings.items() if value is not None})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def logits(model: Any, seed: int = 1) -> torch.Tensor:
    """Logits for a fixed random batch."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 96, (2, 11), generator=generator)
    with torch.no_grad():
        return model(ids.to(model.device)).logits.float().cpu()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """``||found - expected|| / ||expected||``."""
    return float((found - expected).norm() / expected.norm())
