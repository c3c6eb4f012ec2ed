"""The one linear operator behind every format's module.

It picks its path by the batch: few tokens stream the weights once, many use matrix tiles where the machine has them.
Activations become int8 with a scale per group and token, or bf16 where many tokens meet bf16 tiles, unless `exact`:
then the exact weights meet float activations in fp32.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compressor.kernels import blob, loading

# Bound once: looking an overload up costs a tenth of a call.
_linear = None if loading.LIBRARY is None else torch.ops.halfweight.linear.default


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
    assert _linear is not None, "there is no kernel layout without the kernels"
    return _linear(x, prepared[blob.NAME], bias, low_rank, exact)
