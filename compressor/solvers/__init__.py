"""One-shot solvers: they choose a mask and change the kept weights to make up for the pruned ones.

A solver maps a weight [O, I] and statistics with a Hessian to (weight, mask); pruned entries of the weight are zero. A
new one is one file here and one line in SOLVERS.
"""

from collections.abc import Callable

from torch import Tensor

from compressor.calibration import LayerStats
from compressor.solvers import sparsegpt

Solver = Callable[[Tensor, LayerStats], tuple[Tensor, Tensor]]

SOLVERS: dict[str, Solver] = {"sparsegpt": sparsegpt.solve}
