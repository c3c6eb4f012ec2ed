"""Stored form of the low-rank branch (SLoRB, AST section 3.4): `y += S @ (X @ x)`.

X [I / k, I] sums each k consecutive inputs unless it was trained; S [O, I / k] is `low_rank_b`. The branch cannot be
folded into a 2:4 weight, so it is stored and counted on its own: at k = 16 it adds 0.5 bits a weight in int8, 0.25 in
int4.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from compressor.formats.format import Spec, Tensors, checked_floats
from compressor.formats.nibbles import pack_nibbles, unpack_nibbles
from compressor.scheme import LowRank

_LIMITS = {"int8": 127, "int4": 7}
LOW_RANK_NAMES = ("low_rank_a", "low_rank_b", "low_rank_b_scale")


def low_rank_spec(low_rank: LowRank, out_features: int, in_features: int) -> Spec:
    """{name: (shape, dtype)} of the branch of a weight [O, I]; raises ValueError when k does not divide I."""
    if in_features % low_rank.segment:
        raise ValueError(f"in_features {in_features} is not a multiple of low_rank.segment {low_rank.segment}")
    rank = in_features // low_rank.segment
    if low_rank.dtype == "int4" and rank % 2:
        raise ValueError(f"a branch of {rank} columns is odd; int4 stores two values a byte: store it in int8")
    columns = {"bfloat16": (rank, torch.bfloat16), "int8": (rank, torch.int8), "int4": (rank // 2, torch.uint8)}
    width, dtype = columns[low_rank.dtype]
    spec: Spec = {"low_rank_b": ((out_features, width), dtype)}
    if low_rank.dtype != "bfloat16":
        spec["low_rank_b_scale"] = ((out_features, 1), torch.bfloat16)
    if low_rank.trained_projection:
        spec["low_rank_a"] = ((rank, in_features), torch.bfloat16)
    return spec


def pack_low_rank(low_rank: LowRank, b: Tensor, a: Tensor | None = None) -> dict[str, Tensor]:
    """Stored tensors of a branch with S = `b` [O, I / k] and, where it was trained, X = `a` [I / k, I].

    Raises:
        ValueError: NaN, infinity or values beyond bf16, or an X that `low_rank` does not speak of.
    """
    tensors: dict[str, Tensor] = {}
    if low_rank.dtype in _LIMITS:
        limit = _LIMITS[low_rank.dtype]
        largest = checked_floats(b, torch.float32).abs().amax(1, keepdim=True)
        scale = (largest / limit).clamp_min(torch.finfo(torch.bfloat16).tiny).to(torch.bfloat16)
        values = (b.float() / scale.float()).round().clamp(-limit, limit).to(torch.int8)
        tensors["low_rank_b"] = pack_nibbles(values) if low_rank.dtype == "int4" else values
        tensors["low_rank_b_scale"] = scale
    else:
        tensors["low_rank_b"] = checked_floats(b, torch.bfloat16)
    if (a is not None) != low_rank.trained_projection:
        raise ValueError("the trained projection and low_rank.trained_projection disagree")
    if a is not None:
        tensors["low_rank_a"] = checked_floats(a, torch.bfloat16)
    return tensors


def low_rank_linear(x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """The branch's output [..., O] in x's dtype for x [..., I] and stored tensors."""
    b = _values(tensors)
    if "low_rank_a" in tensors:
        projected = F.linear(x, tensors["low_rank_a"].to(x.dtype))
    else:
        projected = x.unflatten(-1, (b.shape[1], -1)).float().sum(-1).to(x.dtype)
    y = F.linear(projected, b.to(x.dtype))
    return y * tensors["low_rank_b_scale"].to(x.dtype).squeeze(1) if "low_rank_b_scale" in tensors else y


def _values(tensors: Mapping[str, Tensor]) -> Tensor:
    """S [O, I / k] before its scale; a byte of two values is the one unsigned form."""
    b = tensors["low_rank_b"]
    return unpack_nibbles(b) if b.dtype == torch.uint8 else b


def low_rank_weight(tensors: Mapping[str, Tensor], in_features: int) -> Tensor:
    """The branch as a dense weight [O, I] in float32: `S @ X`."""
    b = _values(tensors).float()
    if "low_rank_b_scale" in tensors:
        b = b * tensors["low_rank_b_scale"].float()
    if "low_rank_a" in tensors:
        return b @ tensors["low_rank_a"].float()
    return b.repeat_interleave(in_features // b.shape[1], dim=1)


def has_low_rank(tensors: Tensors) -> bool:
    """Whether a module's tensors hold a branch."""
    return "low_rank_b" in tensors
