"""Magnitude: keep the largest |W|. Needs no data; it is also the criterion AST refreshes its masks by."""

from torch import Tensor

from compressor.calibration import LayerStats


def score(weight: Tensor, stats: LayerStats | None = None) -> Tensor:
    """|W|, shape [O, I]."""
    return weight.abs()
