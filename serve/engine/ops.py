"""The operations of a decoder step beside the linears.

Shapes: T tokens of this step, S sequences, H query heads, Hkv key heads, D head size, C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def store_kv(key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    keep = slot_mapping >= 0
    slots = slot_mapping[keep]
    k_cache.view(-1, *k_cache.shape[2:])[slots] = key[keep].to(k_cache.dtype)
    v_cache.view(-1, *v_cache.shape[2:])[slots] = value[keep].to(v_cache.dtype)


def paged_attention(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    scale: float,
) -> Tensor:
    out = torch.empty_like(query)
    size = k_cache.shape[1]
    starts = query_start.tolist()
    for s, context in enumerate(context_lens.tolist()):
        begin, end = starts[s], starts[s + 1]
        if begin == end:
            continue
        blocks = block_tables[s, : -(-context // size)].long()
        key = k_cache[blocks].flatten(0, 1)[:context].to(query.dtype).transpose(0, 1)
        value = v_cache[blocks].flatten(0, 1)[:context].to(query.dtype).transpose(0, 1)
        positions = torch.arange(context - (end - begin), context)
        mask = positions[:, None] >= torch.arange(context)[None]
        attended = F.scaled_dot_product_attention(
            query[begin:end].transpose(0, 1)[None], key[None], value[None], mask, scale=scale, enable_gqa=True
        )
        out[begin:end] = attended[0].transpose(0, 1)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x32 = x.float()
    x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return weight * x32.to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return rms_norm(total, weight, eps), total


def silu_and_mul(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def rotary_embedding(q: Tensor, k: Tensor, cos_sin: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = cos_sin[positions][:, None].chunk(2, dim=-1)

    def turn(x: Tensor) -> Tensor:
        a, b = x.float().chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)

    return turn(q), turn(k)
