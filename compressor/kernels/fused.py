"""Norms, gated activation and rotary positions: each a chain of small torch operators done in one pass.

Sums and products are in fp32, rounded once. Without the compiled kernels the same functions run in plain torch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from compressor.kernels import loading


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[..., C]: x / sqrt(mean(x^2) + eps) * weight, in x's dtype."""
    if loading.LIBRARY is not None:
        return torch.ops.halfweight.rms_norm(x, weight, eps)
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(sum), sum) with sum = x + residual [..., C], rounded to x's dtype."""
    if loading.LIBRARY is not None:
        normed, total = torch.ops.halfweight.add_rms_norm(x, residual, weight, eps)
        return normed, total
    total = (x.float() + residual.float()).to(x.dtype)
    return rms_norm(total, weight, eps), total


def silu_and_mul(x: Tensor) -> Tensor:
    """[..., C]: silu(gate) * up from x [..., 2C], gate first."""
    if loading.LIBRARY is not None:
        return torch.ops.halfweight.silu_and_mul(x)
    gate, up = x.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(x.dtype)


def rotary_embedding(q: Tensor, k: Tensor, cos_sin: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """q and k rotated (NeoX style: the halves of D are the pairs).

    Args:
        q, k: [T, H, D] and [T, Hkv, D].
        cos_sin: [max_positions, D] float32: D / 2 cosines, then D / 2 sines.
        positions: [T] int64.
    """
    if loading.LIBRARY is not None:
        q_rotated, k_rotated = torch.ops.halfweight.rotary_embedding(q, k, cos_sin, positions)
        return q_rotated, k_rotated
    cos, sin = cos_sin[positions][:, None].chunk(2, dim=-1)

    def rotate(x: Tensor) -> Tensor:
        a, b = x.float().chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)

    return rotate(q), rotate(k)
