"""`dense`: bf16 or fp16 weights stay as they are stored: torch's own linear reads them at memory speed.

`prepare_blob` gives the kernel layout, whose linear accumulates in fp32 and takes the low-rank branch.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from compressor.kernels import blob

FASTER_ON = ("avx2", "avx2_vnni")
"""Instruction sets where this kernel beats torch, which multiplies bf16 there by converting number by number."""


def prepare(tensors: Mapping[str, Tensor], group_size: int = -1) -> dict[str, Tensor]:
    """The stored tensors: `linear` reads them in place."""
    return dict(tensors)


def linear(x: Tensor, prepared: Mapping[str, Tensor], bias: Tensor | None = None) -> Tensor:
    """[..., O] in x's dtype."""
    weight = prepared["weight"].to(x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def rows(prepared: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """[..., I]: the rows `ids` [...]."""
    return F.embedding(ids, prepared["weight"])


def prepare_blob(weight: Tensor, segment: int = 0) -> Tensor:
    """The kernel layout of a weight [O, I]; see `low_rank.py` for `segment`."""
    header = blob.Header("dense", weight.dtype, weight.shape[0], weight.shape[1], 0, segment)
    return blob.write(header, blob.interleaved(blob.blocked(weight, 32, header).unflatten(-1, (16, 2))), None)
