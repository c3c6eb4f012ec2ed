"""`int4`: 4 bits a weight and the scales; what 2:4 is compared with."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compressor.kernels import blob
from compressor.kernels.linear import linear
from compressor.kernels.rows import rows

__all__ = ["linear", "prepare", "rows"]


def prepare(tensors: Mapping[str, Tensor], group_size: int = -1) -> dict[str, Tensor]:
    """The kernel layout of stored tensors, or the tensors themselves where no kernel takes the group size."""
    packed, scale = tensors["weight_packed"], tensors["weight_scale"]
    in_features = 2 * packed.shape[1]
    if not blob.supports(in_features, group_size):
        return dict(tensors)
    header = blob.Header("int4", scale.dtype, packed.shape[0], in_features, max(group_size, 0))
    pairs = blob.blocked(packed, 16, header, value=0x88) ^ 0x88
    columns = torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(-2).unflatten(-1, (4, 2, 4))
    lanes = columns[..., 0, :] | (columns[..., 1, :] << 4)  # [B, 16, C, 4, 4]: column 8i + c with column 8i + 4 + c
    return blob.prepared(header, blob.interleaved(lanes), scale)
