"""The one linear operator behind every format's module.

It picks its path by the batch: few tokens stream the weights once, many use matrix tiles where the machine has them.
Activations become int8 with a scale per group and token, unless `exact`: then the exact weights meet float activations
in fp32.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compressor.kernels import blob


def linear(
    x: Tensor,
    prepared: Mapping[str, Tensor],
    bias: Tensor | None = None,
    low_rank: Tensor | None = None,
    exact: bool = False,
) -> Tensor:
    """[..., O] in x's dtype.

    Args:
        x: [..., I], bf16, fp16 or fp32.
        prepared: what a format's `prepare` returned.
        bias: [O] in any of these dtypes.
        low_rank: what `low_rank.prepare` returned: adds S @ (segment sums of x).
        exact: float activations instead of int8 ones.
    """
    return torch.ops.halfweight.linear(x, prepared[blob.NAME], bias, low_rank, exact)
