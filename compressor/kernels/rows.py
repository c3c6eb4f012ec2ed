"""Rows of a weight in the kernel layout, dequantised: the embedding gather, and the way back for inspection."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compressor.kernels import blob


def rows(prepared: Mapping[str, Tensor], ids: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """[..., I] in `dtype`: the rows `ids` [...] (int64) of the weight."""
    in_features = prepared[blob.COLUMNS].shape[1]
    return torch.ops.halfweight.rows(prepared[blob.NAME], ids, in_features).to(dtype)
