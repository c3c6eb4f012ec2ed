"""`sparse24`: 9 bits a weight, bf16 or fp16 values, float activations."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compressor.kernels import blob
from compressor.kernels.linear import linear
from compressor.kernels.rows import rows

__all__ = ["linear", "prepare", "rows"]


def prepare(tensors: Mapping[str, Tensor], group_size: int = -1) -> dict[str, Tensor]:
    """The kernel layout of stored tensors; the group size means nothing here."""
    packed = tensors["weight_packed"]
    header = blob.Header("sparse24", packed.dtype, packed.shape[0], 2 * packed.shape[1], 0)
    pairs = blob.blocked(packed, 16, header).unflatten(-1, (8, 2))
    chunks = torch.cat([blob.meta_vectors(tensors["weight_meta"], header), blob.interleaved(pairs)], dim=-1)
    return blob.prepared(header, chunks, None)
