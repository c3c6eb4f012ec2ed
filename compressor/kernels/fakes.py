"""Shapes and dtypes of the operators' results, so that `torch.compile(fullgraph=True)` traces through them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def register_fakes() -> None:
    """Registers a fake implementation for every operator; called once, after the library is loaded."""
    for name, fake in FAKES.items():
        torch.library.register_fake(f"halfweight::{name}", fake)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, low_rank: Tensor | None, exact: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _rows(weight: Tensor, ids: Tensor, in_features: int) -> Tensor:
    return ids.new_empty((*ids.shape, in_features), dtype=torch.float32)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _silu_and_mul(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def _rotary_embedding(q: Tensor, k: Tensor, cos_sin: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _store_kv(key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    return None


def _paged_attention(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    scale: float,
) -> Tensor:
    return query.new_empty(query.shape)


def _decoder_layers(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


FAKES: dict[str, Callable[..., Any]] = {
    "linear": _linear,
    "rows": _rows,
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "silu_and_mul": _silu_and_mul,
    "rotary_embedding": _rotary_embedding,
    "store_kv": _store_kv,
    "paged_attention": _paged_attention,
    "decoder_layers": _decoder_layers,
}
