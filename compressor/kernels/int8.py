"""`int8`: 8 bits a weight and the scales; embeddings and LM heads, so `rows` gathers from the kernel layout too."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from compressor.kernels import blob
from compressor.kernels.linear import linear
from compressor.kernels.rows import rows

__all__ = ["linear", "prepare", "rows"]


def prepare(tensors: Mapping[str, Tensor], group_size: int = -1) -> dict[str, Tensor]:
    """The kernel layout of stored tensors, or the tensors themselves where no kernel takes the group size."""
    packed, scale = tensors["weight_packed"], tensors["weight_scale"]
    if not blob.supports(packed.shape[1], group_size):
        return dict(tensors)
    header = blob.Header("int8", scale.dtype, packed.shape[0], packed.shape[1], max(group_size, 0))
    chunks = blob.interleaved(blob.blocked(packed, 32, header).unflatten(-1, (8, 4)))
    return blob.prepared(header, chunks, scale)
