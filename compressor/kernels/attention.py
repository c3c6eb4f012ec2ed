"""Attention over a paged key-value cache, for decode and for (chunked) prefill alike.

Shapes: T tokens of all sequences one behind the other, S sequences, H query heads, Hkv key-value heads, D head size.
A cache is bf16 [num_blocks, block_size, Hkv, D]. An int8 cache is uint8 [num_blocks, block_size, Hkv, D + 4]: D int8
values of one token and head, then the float32 factor that they share. An fp8 cache is uint8 [num_blocks, block_size,
Hkv, D]: e4m3 values without a factor, those beyond 448 cut to it. Without the compiled kernels the same functions run
in plain torch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from compressor.kernels import loading

FACTOR_BYTES = 4
FP8 = torch.float8_e4m3fn
_LARGEST_HEAD, _MOST_SHARING = 512, 64
"""What csrc/attention_operator.cpp takes: values of a head, query heads of a kv head."""


def cache_dtype_of(name: str) -> torch.dtype:
    """The dtype of a cache by its name: `fp8`, or torch's own."""
    found: torch.dtype = FP8 if name == "fp8" else getattr(torch, name)
    return found


def takes(heads: int, kv_heads: int, dim: int) -> bool:
    """Whether the compiled attention knows heads of this size, so many to a kv head."""
    return dim % 16 == 0 and dim <= _LARGEST_HEAD and heads <= _MOST_SHARING * kv_heads


def row_bytes(dim: int, dtype: torch.dtype) -> int:
    """Bytes of one token and head in a cache of `dtype`; an int8 one holds factors too."""
    return dim + FACTOR_BYTES if dtype == torch.int8 else dim * dtype.itemsize


def empty_cache(num_blocks: int, block_size: int, kv_heads: int, dim: int, dtype: torch.dtype) -> Tensor:
    """A cache for keys or values, not zeroed: its pages cost memory only once they are used."""
    if dtype in (torch.int8, FP8):
        return torch.empty(num_blocks, block_size, kv_heads, row_bytes(dim, dtype), dtype=torch.uint8)
    return torch.empty(num_blocks, block_size, kv_heads, dim, dtype=dtype)


def store_kv(key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Writes keys and values into the caches, in place.

    Args:
        key, value: [T, Hkv, D].
        k_cache, v_cache: [num_blocks, block_size, Hkv, D], bf16, int8 or fp8.
        slot_mapping: [T] int64, block * block_size + offset; -1 skips the token.
    """
    if loading.LIBRARY is not None:
        torch.ops.halfweight.store_kv(key, value, k_cache, v_cache, slot_mapping)
        return
    kept = slot_mapping >= 0
    for new, cache in ((key, k_cache), (value, v_cache)):
        cache.flatten(0, 1)[slot_mapping[kept]] = _rows(new[kept], cache)


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
        k_cache, v_cache: [num_blocks, block_size, Hkv, D], bf16, int8 or fp8, this step's tokens already stored.
        block_tables: [S, max_blocks] int32.
        query_start: [S + 1] int32.
        context_lens: [S] int32, tokens in the cache, this step's included.
        scale: factor of the scores, usually D ** -0.5.
    """
    if loading.LIBRARY is not None and takes(query.shape[1], k_cache.shape[2], query.shape[2]):
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
        keys, values = (
            _floats(cache[blocks].flatten(0, 1)[:length], query.shape[2]).transpose(0, 1)
            for cache in (k_cache, v_cache)
        )
        rows = torch.arange(length - (end - begin), length)[:, None]
        out[begin:end] = (
            F.scaled_dot_product_attention(
                query[begin:end].transpose(0, 1)[None].float(),
                keys[None],
                values[None],
                attn_mask=torch.arange(length)[None, :] <= rows,
                scale=scale,
                enable_gqa=True,
            )[0]
            .transpose(0, 1)
            .to(query.dtype)
        )
    return out


def _rows(x_THD: Tensor, cache: Tensor) -> Tensor:
    """Keys or values as the rows of a cache."""
    if cache.dtype != torch.uint8:
        return x_THD.to(cache.dtype)
    return _to_fp8(x_THD) if cache.shape[3] == x_THD.shape[2] else _to_int8(x_THD)


def _to_fp8(x_THD: Tensor) -> Tensor:
    """Rows of an fp8 cache, uint8 [T, H, D]; e4m3 has no infinity, which becomes NaN."""
    x_THD = x_THD.float()
    ends = torch.where(x_THD.isfinite(), x_THD.clamp(-448, 448), torch.nan)
    return ends.to(FP8).view(torch.uint8)


def _to_int8(x_THD: Tensor) -> Tensor:
    """Rows of an int8 cache, uint8 [T, H, D + 4]; those with NaN or infinity get the factor NaN, as in the kernel."""
    x_THD = x_THD.float()
    largest = x_THD.abs().amax(-1, keepdim=True)
    used = largest.isfinite() & (largest >= 1e-35)
    values = torch.where(used, x_THD * (127 / largest), 0).round().to(torch.int8)
    factors = torch.where(used, largest / 127, torch.where(largest.isfinite(), 0.0, torch.nan))
    return torch.cat([values.view(torch.uint8), factors.view(torch.uint8)], dim=-1)


def _floats(rows: Tensor, dim: int) -> Tensor:
    """The values [..., dim] of a cache's rows, float32."""
    if rows.dtype != torch.uint8:
        return rows.float()
    if rows.shape[-1] == dim:
        return rows.view(FP8).float()
    values, factors = rows.split((rows.shape[-1] - FACTOR_BYTES, FACTOR_BYTES), dim=-1)
    return values.view(torch.int8).float() * factors.contiguous().view(torch.float32)
