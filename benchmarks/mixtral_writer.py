"""Writes a Mixtral GPTQ checkpoint in TheBloke's layout with random codes, at any size.

    python benchmarks/mixtral_writer.py FOLDER --layers 4 --bits 4 --group-size 128 --shards 4
    python benchmarks/mixtral_writer.py FOLDER --branch gptq-4bit-128g-actorder_True

Zero-mean weights with the spread of real ones, so that routing does not collapse on a few experts. The codes of each
shape are drawn once; every module gets them with its columns permuted and its rows rolled, which is as fast as memory.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file

from graftq.quant_linear.packing import pack_codes

EXPERTS = 8

BRANCHES = {
    "main": (4, -1),
    "gptq-4bit-128g-actorder_True": (4, 128),
    "gptq-4bit-32g-actorder_True": (4, 32),
    "gptq-3bit--1g-actorder_True": (3, -1),
    "gptq-3bit-128g-actorder_True": (3, 128),
    "gptq-8bit--1g-actorder_True": (8, -1),
    "gptq-8bit-128g-actorder_True": (8, 128),
}
"""Bits and group size of the branches of TheBloke/Mixtral-8x7B-Instruct-v0.1-GPTQ, all with act-order."""


def write(
    folder: Path,
    layers: int = 4,
    hidden: int = 4096,
    intermediate: int = 14336,
    bits: int = 4,
    group_size: int = 128,
    desc_act: bool = True,
    shards: int = 4,
    vocabulary: int = 32000,
) -> int:
    """Write the checkpoint; layers are spread evenly over ``shards`` files. Returns its size in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    parameters = {"bits": bits, "group_size": group_size, "desc_act": desc_act, "sym": True, "quant_method": "gptq"}
    config = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 128,
        "num_key_value_heads": max(hidden // 512, 1),
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "vocab_size": vocabulary,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "torch_dtype": "float16",
        "tie_word_embeddings": False,
        "quantization_config": parameters,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "quantize_config.json").write_text(json.dumps(parameters, indent=2))
    shapes = {(n, k) for together in _modules(0, hidden, intermediate) for _, n, k in together}
    words = {(n, k): _random_words(n, k, bits, torch.Generator().manual_seed(n + k)) for n, k in sorted(shapes)}
    weight_map, total = {}, 0

    def make_shard(shard: int) -> tuple[str, dict[str, int]]:
        generator = torch.Generator().manual_seed(shard)
        tensors: dict[str, torch.Tensor] = {}
        for layer in range(layers * shard // shards, layers * (shard + 1) // shards):
            for together in _modules(layer, hidden, intermediate):
                k = together[0][2]
                order = torch.randperm(k, generator=generator) if desc_act else torch.arange(k)
                g_idx = (order // (k if group_size == -1 else group_size)).to(torch.int32)
                for module, n, _ in together:
                    own = _shuffled(words[n, k], bits, generator)
                    tensors.update(_packed(module, own, g_idx, bits))
            prefix = f"model.layers.{layer}"
            tensors[f"{prefix}.block_sparse_moe.gate.weight"] = _normal(EXPERTS, hidden, generator)
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{prefix}.{norm}.weight"] = torch.ones(hidden, dtype=torch.float16)
        if shard == 0:
            tensors["model.embed_tokens.weight"] = _normal(vocabulary, hidden, generator)
        if shard == shards - 1:
            tensors["model.norm.weight"] = torch.ones(hidden, dtype=torch.float16)
            tensors["lm_head.weight"] = _normal(vocabulary, hidden, generator)
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        return name, {tensor: value.nbytes for tensor, value in tensors.items()}

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # torch lets go of the interpreter's lock
        for name, sizes in pool.map(make_shard, range(shards)):
            weight_map.update(dict.fromkeys(sizes, name))
            total += sum(sizes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _modules(layer: int, hidden: int, intermediate: int) -> Iterator[list[tuple[str, int, int]]]:
    """Name, outputs and inputs of the projections; those with one input come together: they share their act-order."""
    prefix, narrow = f"model.layers.{layer}", max(hidden // 512, 1) * 128
    attention, experts = f"{prefix}.self_attn", f"{prefix}.block_sparse_moe.experts"
    yield [(f"{attention}.{name}_proj", n, hidden) for name, n in (("q", hidden), ("k", narrow), ("v", narrow))]
    yield [(f"{attention}.o_proj", hidden, hidden)]
    for expert in range(EXPERTS):
        yield [(f"{experts}.{expert}.{name}", intermediate, hidden) for name in ("w1", "w3")]
        yield [(f"{experts}.{expert}.w2", hidden, intermediate)]


def _random_words(n: int, k: int, bits: int, generator: torch.Generator) -> torch.Tensor:
    """``qweight`` [k * bits / 32, n] of uniform codes around the symmetric zero point: 0 would have no opposite."""
    columns = [
        pack_codes(torch.randint(1, 2**bits, (k, width), dtype=torch.uint8, generator=generator), bits)
        for width in (len(part) for part in torch.arange(n).split(1024))
    ]
    return torch.cat(columns, 1)


def _shuffled(words: torch.Tensor, bits: int, generator: torch.Generator) -> torch.Tensor:
    """The columns permuted, and the rows rolled by whole blocks of 32 codes."""
    rows, n = words.shape
    block = int(torch.randint(rows // bits, (), generator=generator)) * bits
    permutation = torch.randperm(n, generator=generator)
    return torch.cat((words[block:], words[:block]))[:, permutation]


def _packed(module: str, words: torch.Tensor, g_idx: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
    n, k = words.shape[1], len(g_idx)
    groups = int(g_idx.max()) + 1
    levels = 2**bits - 1
    spread = (k * (levels**2 - 1) / 12) ** -0.5  # the variance of `levels` uniform codes is (levels^2 - 1) / 12
    scales = torch.full((groups, n), spread, dtype=torch.float16)
    # A symmetric zero point, minus one, repeated over the words; 32 codes fill `bits` words.
    stored = sum((2 ** (bits - 1) - 1) << (bits * position) for position in range(32))
    pattern = torch.tensor([(stored >> (32 * word)) & 0xFFFFFFFF for word in range(bits)], dtype=torch.int64)
    return {
        f"{module}.qweight": words,
        f"{module}.qzeros": pattern.to(torch.int32).repeat(groups, n // 32),
        f"{module}.scales": scales,
        f"{module}.g_idx": g_idx.clone(),  # files hold no tensor twice
    }


def _normal(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    return (torch.randn(rows, columns, generator=generator) * 0.02).to(torch.float16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for option, default in (("layers", 4), ("hidden", 4096), ("intermediate", 14336), ("bits", 4), ("shards", 4)):
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--branch", choices=BRANCHES, help="bits and group size of that branch, and all 32 layers")
    options = vars(parser.parse_args())
    if branch := options.pop("branch"):
        options["bits"], options["group_size"] = BRANCHES[branch]
        options["layers"] = options["shards"] = 32
    print(f"{write(**options) / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
