"""Attention over a paged key-value cache, for decode and for (chunked) prefill alike.

Shapes: T tokens of all sequences one behind the other, S sequences, H query heads, Hkv key-value heads, D head size.
A cache is bf16 [num_blocks, block_size, Hkv, D]. Without the compiled kernels the same functions run in plain torch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from compressor.kernels import loading


def store_kv(key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Writes keys and values into the caches, in place.

    Args:
        key, value: [T, Hkv, D].
        k_cache, v_cache: bf16 [num_blocks, block_size, Hkv, D].
        slot_mapping: [T] int64, block * block_size + offset; -1 skips the token.
    """
    if loading.LIBRARY is not None:
        torch.ops.halfweight.store_kv(key, value, k_cache, v_cache, slot_mapping)
        return
    kept = slot_mapping >= 0
    for new, cache in ((key, k_cache), (value, v_cache)):
        cache.flatten(0, 1)[slot_mapping[kept]] = new[kept].to(cache.dtype)


def paged_attention(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    scale: float,
) -> Tensor:
    """[T, H, D]: causal attention of every sequence's newest tokens over its whole context.

    Args:
        query: [T, H, D]; sequence s owns tokens query_start[s] to query_start[s + 1].
        k_cache, v_cache: bf16 [num_blocks, block_size, Hkv, D], this step's tokens already stored.
        block_tables: [S, max_blocks] int32.
        query_start: [S + 1] int32.
        context_lens: [S] int32, tokens in the cache, this step's included.
        scale: factor of the scores, usually D ** -0.5.
    """
    if loading.LIBRARY is not None and query.shape[2] % 16 == 0:
        return torch.ops.halfweight.paged_attention(
            query, k_cache, v_cache, block_tables, query_start, context_lens, scale
        )
    out = torch.zeros_like(query)
    starts = query_start.tolist()
    for s, length in enumerate(context_lens.tolist()):
        begin, end = starts[s], starts[s + 1]
        if begin == end:
            continue
        blocks = block_tables[s, : -(-length // k_cache.shape[1])].long()
        keys, values = (cache[blocks].flatten(0, 1)[:length].transpose(0, 1) for cache in (k_cache, v_cache))
        rows = torch.arange(length - (end - begin), length)[:, None]
        out[begin:end] = (
            F.scaled_dot_product_attention(
                query[begin:end].transpose(0, 1)[None].float(),
                keys[None].float(),
                values[None].float(),
                attn_mask=torch.arange(length)[None, :] <= rows,
                scale=scale,
                enable_gqa=True,
            )[0]
            .transpose(0, 1)
            .to(query.dtype)
        )
    return out
