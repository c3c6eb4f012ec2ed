"""The steps of a decoder beside the linears: our kernels, and a reference for float32.

The kernels keep keys and values in bf16, int8 or fp8. `--dtype float32` is there to compare with, so it keeps them in
float32 and attends in plain torch, one sequence after the other.

Shapes: T tokens of this step, S sequences, H query heads, Hkv key heads, D head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from compressor.kernels import attention
from compressor.kernels.fused import add_rms_norm, rms_norm, rotary_embedding, silu_and_mul

__all__ = ["add_rms_norm", "paged_attention", "rms_norm", "rotary_embedding", "silu_and_mul", "store_kv"]


def store_kv(key_THD: Tensor, value_THD: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Write this step's keys and values to their slots, in place."""
    if k_cache.dtype != torch.float32:
        attention.store_kv(key_THD, value_THD, k_cache, v_cache, slot_mapping)
        return
    k_cache.flatten(0, 1)[slot_mapping] = key_THD
    v_cache.flatten(0, 1)[slot_mapping] = value_THD


def paged_attention(
    query_THD: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    scale: float,
) -> Tensor:
    """[T, H, D]: every token attends to its sequence up to itself."""
    if k_cache.dtype != torch.float32:
        return attention.paged_attention(query_THD, k_cache, v_cache, block_tables, query_start, context_lens, scale)
    out = torch.empty_like(query_THD)
    starts = query_start.tolist()
    for s, context in enumerate(context_lens.tolist()):
        begin, end = starts[s], starts[s + 1]
        blocks = block_tables[s, : -(-context // k_cache.shape[1])].long()
        keys, values = (cache[blocks].flatten(0, 1)[:context].transpose(0, 1)[None] for cache in (k_cache, v_cache))
        positions = torch.arange(context - (end - begin), context)
        mask = positions[:, None] >= torch.arange(context)
        query = query_THD[begin:end].transpose(0, 1)[None]
        attended = F.scaled_dot_product_attention(query, keys, values, mask, scale=scale, enable_gqa=True)
        out[begin:end] = attended[0].transpose(0, 1)
    return out
