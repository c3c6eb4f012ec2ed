"""`sparse24_int8`: 5 bits a weight and the scales."""

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
    header = blob.Header("sparse24_int8", scale.dtype, packed.shape[0], in_features, max(group_size, 0))
    # [B, 16, C, quad / 4, quad % 4, slot] -> vectors (quad / 4, slot) with quad % 4 as the byte of the lane.
    slots = blob.blocked(packed, 16, header).unflatten(-1, (2, 4, 2)).transpose(-1, -2).flatten(3, 4)
    chunks = torch.cat([blob.meta_vectors(tensors["weight_meta"], header), blob.interleaved(slots)], dim=-1)
    return blob.prepared(header, chunks, scale)
