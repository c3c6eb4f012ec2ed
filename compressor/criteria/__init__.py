"""Pruning criteria: which weights of a linear to keep, before any of them is retrained.

A criterion maps a weight [O, I] and the layer's statistics to a score of the same shape; higher is kept.
A new one is one file here and one line in CRITERIA.
"""

from collections.abc import Callable

from torch import Tensor

from compressor.calibration import LayerStats
from compressor.criteria import magnitude, wanda

Criterion = Callable[[Tensor, LayerStats | None], Tensor]

CRITERIA: dict[str, Criterion] = {
    "given": magnitude.score,
    "magnitude": magnitude.score,
    "wanda": wanda.score,
}
"""`given` takes the mask that a weight has: zeros score least, and pruning refuses a weight with too few of them."""

WITHOUT_TEXT = ("given", "magnitude")
"""Criteria that need no statistics."""
