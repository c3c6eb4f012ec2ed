"""SparseGPT: prune by the OBS score and let the kept weights to the right make up for it (arXiv 2301.00774).

Columns are worked through from left to right; rows are independent. With U the upper Cholesky factor of the
inverse Hessian, pruning column j of a row costs (w_j / U_jj)^2, and subtracting (w_j / U_jj) * U[j, j:] is the best
correction with the columns still free. The mask of a group is chosen when its first column is reached, so earlier
corrections count. Corrections are applied at once inside a group, and by one product each to the rest of the block of
columns and to the blocks behind it.

Shapes: O out_features, I in_features, C columns of a block.
"""

import torch
from torch import Tensor

from compressor.calibration import LayerStats
from compressor.hessian import inverse_factor
from compressor.masks import n_m_mask

_BLOCK = 128


@torch.no_grad()
def solve(weight: Tensor, stats: LayerStats, n: int = 2, m: int = 4) -> tuple[Tensor, Tensor]:
    """The pruned and corrected weight [O, I] in the weight's dtype, and its mask."""
    if stats.hessian is None:
        raise ValueError("solver 'sparsegpt' needs Hessians; calibrate with hessian=True")
    if stats.hessian.shape[0] != weight.shape[1]:
        raise ValueError(
            f"Hessian of {stats.hessian.shape[0]} input features given for a weight of {tuple(weight.shape)}"
        )
    w = weight.to(torch.float32).clone()
    mask = torch.zeros_like(w, dtype=torch.bool)
    u = inverse_factor(stats.hessian)
    width = _BLOCK - _BLOCK % m
    for start in range(0, w.shape[1], width):
        end = min(start + width, w.shape[1])
        errors = _solve_block(w[:, start:end], mask[:, start:end], u[start:end, start:end], n, m)
        w[:, end:] -= errors @ u[start:end, end:]
    return w.mul_(mask).to(weight.dtype), mask


def _solve_block(w_OC: Tensor, mask_OC: Tensor, u_CC: Tensor, n: int, m: int) -> Tensor:
    """Prune and correct one block of columns in place; returns the scaled errors [O, C] that the rest must take."""
    columns = w_OC.t().contiguous()
    errors = torch.zeros_like(columns)
    scale = u_CC.diagonal()
    for first in range(0, columns.shape[0], m):
        last = first + m
        group = slice(first, last)
        keep = n_m_mask((columns[group] / scale[group, None]).square().t(), n, m)
        mask_OC[:, group] = keep
        for j in range(first, last):
            errors[j] = torch.where(keep[:, j - first], 0.0, columns[j]) / scale[j]
            columns[j:last].addr_(u_CC[j, j:last], errors[j], alpha=-1.0)
        columns[last:].addmm_(u_CC[group, last:].t(), errors[group], alpha=-1.0)
    w_OC.copy_(columns.t())
    turned: Tensor = errors.t()
    return turned
