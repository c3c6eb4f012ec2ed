"""`sparse24_int4`: 3 bits a weight and the scales; the kept values pick their activations by `vpshufb`."""

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
    in_features = 4 * packed.shape[1]
    if not blob.supports(in_features, group_size):
        return dict(tensors)
    header = blob.Header("sparse24_int4", scale.dtype, packed.shape[0], in_features, max(group_size, 0))
    # One byte per quad; nibbles become two's complement. [B, 16, C, 2, 4]: quads c and c + 4 in two vectors.
    quads = (blob.blocked(packed, 8, header, value=0x88) ^ 0x88).unflatten(-1, (2, 4))
    chunks = torch.cat([blob.meta_vectors(tensors["weight_meta"], header), blob.interleaved(quads)], dim=-1)
    return blob.prepared(header, chunks, scale)
