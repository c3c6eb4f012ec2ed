"""Wanda: |W| times the L2 norm of its input feature (Sun et al., arXiv 2306.11695).

A weight is worth what it can move in the output: a small weight on a loud feature outlives a large one
on a quiet feature. One forward pass over the calibration text, no solving.
"""

import torch
from torch import Tensor

from compressor.calibration import LayerStats


def score(weight: Tensor, stats: LayerStats | None) -> Tensor:
    """|W| * ||x||_2, shape [O, I]."""
    if stats is None:
        raise ValueError("criterion 'wanda' needs calibration statistics; give calibration text, or use 'magnitude'")
    if stats.input_norm.shape != weight.shape[-1:]:
        raise ValueError(
            f"statistics of {tuple(stats.input_norm.shape)} input features given for a weight of {tuple(weight.shape)}"
        )
    return weight.abs().to(torch.float32) * stats.input_norm.to(weight.device)
