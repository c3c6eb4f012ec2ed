"""SparseGPT: prune by the OBS score and let the kept weights to the right make up for it (arXiv 2301.00774).

Columns are worked through from left to right; rows are independent. With U the upper Cholesky factor of the
inverse Hessian, pruning column j of a row costs (w_j / U_jj)^2, and subtracting (w_j / U_jj) * U[j, j:] is the best
correction with the columns still free. The mask of a group is chosen when its first column is reached, so earlier
corrections count; an unstructured mask is chosen for a block of columns at a time, each with its part of the share.
Corrections are applied at once inside a group, and by one product each to the rest of the block of columns and to the
blocks behind it.

Shapes: O out_features, I in_features, C columns of a block.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from compressor.calibration import LayerStats
from compressor.hessian import inverse_factor
from compressor.masks import TWO_OF_FOUR, MaskShape, keep_highest

_BLOCK = 128

Choose = Callable[[Tensor], Tensor]


@torch.no_grad()
def solve(weight: Tensor, stats: LayerStats, shape: MaskShape = TWO_OF_FOUR) -> tuple[Tensor, Tensor]:
    """The pruned and corrected weight [O, I] in the weight's dtype, and its mask."""
    if stats.hessian is None:
        raise ValueError("solver 'sparsegpt' needs Hessians; calibrate with hessian=True")
    if stats.hessian.shape[0] != weight.shape[1]:
        raise ValueError(
            f"Hessian of {stats.hessian.shape[0]} input features given for a weight of {tuple(weight.shape)}"
        )
    shape.check_width(weight.shape[1])
    w = weight.to(torch.float32).clone()
    mask = torch.zeros_like(w, dtype=torch.bool)
    u = inverse_factor(stats.hessian)
    width = max(shape.m, _BLOCK - _BLOCK % shape.m) if shape.by_row else _BLOCK
    choose: Choose
    for start in range(0, w.shape[1], width):
        block = slice(start, min(start + width, w.shape[1]))
        choose, group = shape.mask, shape.m
        if not shape.by_row:
            kept = shape.kept(w.shape[0] * block.stop) - shape.kept(w.shape[0] * start)
            choose, group = _keeping(kept), block.stop - start
        errors = _solve_block(w[:, block], mask[:, block], u[block, block], choose, group)
        w[:, block.stop :] -= errors @ u[block, block.stop :]
    return w.mul_(mask).to(weight.dtype), mask


def _keeping(count: int) -> Choose:
    return lambda score: keep_highest(score, count)


def _solve_block(w_OC: Tensor, mask_OC: Tensor, u_CC: Tensor, choose: Choose, width: int) -> Tensor:
    """Prune and correct one block of columns in place; returns the scaled errors [O, C] that the rest must take."""
    columns = w_OC.t().contiguous()
    errors = torch.zeros_like(columns)
    scale = u_CC.diagonal()
    for first in range(0, columns.shape[0], width):
        last = first + width
        group = slice(first, last)
        keep = choose((columns[group] / scale[group, None]).square().t())
        mask_OC[:, group] = keep
        for j in range(first, last):
            errors[j] = torch.where(keep[:, j - first], 0.0, columns[j]) / scale[j]
            columns[j:last].addr_(u_CC[j, j:last], errors[j], alpha=-1.0)
        columns[last:].addmm_(u_CC[group, last:].t(), errors[group], alpha=-1.0)
    w_OC.copy_(columns.t())
    turned: Tensor = errors.t()
    return turned
