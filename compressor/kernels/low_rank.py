"""The low-rank branch (SLoRB, AST section 3.4) inside the linear operator: y += S @ (sums of x over k columns)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compressor.kernels import blob
from compressor.kernels.dense import prepare_blob


def prepare(tensors: Mapping[str, Tensor], segment: int) -> Tensor:
    """`linear`'s `low_rank`, from `low_rank_b` [O, I / segment] and, if quantised, `low_rank_b_scale` [O, 1]."""
    b, scale = tensors["low_rank_b"], tensors.get("low_rank_b_scale")
    if scale is None:
        return prepare_blob(b, segment)
    if b.dtype == torch.uint8:  # two int4 values a byte; they run as int8
        b = (torch.stack((b & 15, b >> 4), dim=2).flatten(1).to(torch.int8) - 8).contiguous()
    header = blob.Header("int8", scale.dtype, b.shape[0], b.shape[1], 0, segment)
    chunks = blob.interleaved(blob.blocked(b, 32, header).unflatten(-1, (8, 4)))
    return blob.write(header, chunks, scale)
