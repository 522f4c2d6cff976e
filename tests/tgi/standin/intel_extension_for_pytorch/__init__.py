"""In the place of Intel's extension: what the server's flash path asks of it on CPUs, in plain torch.

With this on its path the server believes that it is on its "ipex" system, and its real flash models, loaders, tensor
parallel layers and paged batches run on any CPU. Gloo stands in for oneCCL.
"""

from __future__ import annotations

import sys
import types
from itertools import pairwise

import torch
import torch.distributed
from torch.nn import functional


def _add_rms_norm(add, x, weight, bias, eps, add_back):
    if add is not None:
        x = add + x
        if add_back:
            add.copy_(x)
    normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    return (normed * weight.float()).to(x.dtype)


def _add_layer_norm(add, x, weight, bias, eps, add_back):
    if add is not None:
        x = add + x
        if add_back:
            add.copy_(x)
    return functional.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _rotary_embedding(query, key, sin, cos, rotary_dim, rotary_half):
    for states in (query, key):
        first, second = states[..., : rotary_dim // 2].clone(), states[..., rotary_dim // 2 : rotary_dim].clone()
        states[..., : rotary_dim // 2] = first * cos - second * sin
        states[..., rotary_dim // 2 : rotary_dim] = second * cos + first * sin
    return query, key


def _attend(query, key, value, scale, causal):
    """[tokens, heads, size] each; key and value may have fewer heads."""
    groups = query.shape[1] // key.shape[1]
    q, k, v = (states.transpose(0, 1) for states in (query, key, value))
    k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    return functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale).transpose(0, 1)


def _varlen_attention(query, key, value, out, starts, _, max_q, max_k, dropout, scale, zero, causal, *rest):
    for start, stop in pairwise(starts.tolist()):
        out[start:stop] = _attend(query[start:stop], key[start:stop], value[start:stop], scale, causal)


class _PagedAttention:
    @staticmethod
    def reshape_and_cache(key, value, key_cache, value_cache, slots, **kwargs):
        size = key_cache.shape[2]  # [blocks, heads, block size, head size]
        slots = slots.long()
        key_cache[slots // size, :, slots % size] = key
        value_cache[slots // size, :, slots % size] = value

    @staticmethod
    def single_query_cached_kv_attention(
        out,
        query,
        key_cache,
        value_cache,
        head_mapping,
        scale,
        block_tables,
        lengths,
        block_size,
        max_s,
        *rest,
        **kwargs,
    ):
        for row, length in enumerate(lengths.tolist()):
            blocks = block_tables[row, : -(-length // block_size)].long()
            k, v = (cache[blocks].transpose(1, 2).flatten(0, 1)[:length] for cache in (key_cache, value_cache))
            out[row : row + 1] = _attend(query[row : row + 1], k, v, scale, False)


class _GatedMLPMOE(torch.nn.Module):
    """The server's own experts, unquantized."""

    def __init__(self, W13, W2, use_prepack):
        super().__init__()
        self.gate_up, self.down = W13, W2

    def forward(self, hidden_states, router_logits, top_k, renormalize, **kwargs):
        weights, index = torch.topk(router_logits.float().softmax(-1), top_k, dim=-1)
        if renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        total = torch.zeros_like(hidden_states)
        for expert in range(self.down.shape[0]):
            token, slot = torch.where(index == expert)
            gate, up = functional.linear(hidden_states[token], self.gate_up[expert]).chunk(2, -1)
            output = functional.linear(functional.silu(gate) * up, self.down[expert])
            total.index_add_(0, token, (output * weights[token, slot, None]).to(total.dtype))
        return total


def _init_process_group(backend, **kwargs):
    kwargs.pop("pg_options", None)
    torch.distributed.init_process_group(backend="gloo", **kwargs)


def _all_gather_into_tensor(output, tensor, group):
    """Gloo gathers into lists only."""
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    torch.distributed.all_gather(parts, tensor, group=group)
    output.view(-1).copy_(torch.cat([part.flatten() for part in parts]))


llm, functions, modules = (types.ModuleType(f"{__name__}.{name}") for name in ("llm", "llm.functional", "llm.modules"))
functions.add_rms_norm = _add_rms_norm
functions.add_layer_norm = _add_layer_norm
functions.rotary_embedding = _rotary_embedding
functions.varlen_attention = _varlen_attention
modules.PagedAttention = _PagedAttention
modules.GatedMLPMOE = _GatedMLPMOE
llm.functional, llm.modules = functions, modules
sys.modules.update({module.__name__: module for module in (llm, functions, modules)})

distributed = types.SimpleNamespace(
    init_process_group=_init_process_group,
    all_reduce=torch.distributed.all_reduce,
    all_gather=torch.distributed.all_gather,
    all_gather_into_tensor=_all_gather_into_tensor,
)
