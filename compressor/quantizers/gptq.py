"""GPTQ that keeps the mask (arXiv 2210.17323, with every update multiplied by the mask).

Columns are rounded from left to right; with U the upper Cholesky factor of the inverse Hessian, the error of column j
is made up for by subtracting `(w_j - q_j) / U_jj * U[j, j+1:]` from the columns still free. Plain GPTQ writes that into
pruned positions too and so loses 2:4; here pruned weights take no update and stay zero.

U knows nothing of the mask, so half of each correction is lost. Sweeps of coordinate descent win it back: each kept
value in turn is set to the grid point that is best with all others fixed, which never makes the layer's error larger.
Between sweeps each group's scale is fitted to the values chosen so far, by least squares under the same Hessian.

Shapes: O out_features, I in_features, C columns of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.calibration import LayerStats
from compressor.formats import Format, QuantizedWeight, make_format
from compressor.hessian import inverse_factor
from compressor.quantizers.rtn import rtn, snap
from compressor.scheme import Scheme

_BLOCK = 128
_SWEEPS = 4


@torch.no_grad()
def gptq(weight: Tensor, stats: LayerStats | None, scheme: Scheme, *, act_order: bool = False) -> QuantizedWeight:
    """Rounds a weight [O, I] so that the layer's output changes least.

    Scales are searched group by group as round-to-nearest does, on the weights as corrected so far; with `act_order`,
    columns go from the most active input to the least, and scales are searched beforehand, for groups stay in place.

    Raises:
        ValueError: no Hessian in `stats`, NaN in the weight, or a shape that the format refuses.
    """
    fmt = make_format(scheme)
    if not fmt.scaled:
        return rtn(weight, stats, scheme)
    if stats is None or stats.hessian is None:
        raise ValueError("quantizer 'gptq' needs Hessians; calibrate with hessian=True, or use the quantizer 'rtn'")
    original = weight.detach().to(torch.float32)
    mask = original != 0  # in a dense format too: it may hold another sparsity than 2:4
    solve = _by_activity if act_order else _by_group
    w, scale = solve(original, mask, stats, scheme, fmt)
    size = w.shape[1] // scale.shape[1]
    hessian = stats.hessian + 0.01 * stats.hessian.diagonal().mean() * torch.eye(w.shape[1], device=w.device)
    for sweep in range(_SWEEPS):
        if sweep:
            _fit_scales(w, original, hessian, scale)
        _sweep(w, original, mask, hessian, scale.float().repeat_interleave(size, dim=1), fmt)
    return snap(w, scale, fmt)


def _by_group(original: Tensor, mask: Tensor, stats: LayerStats, scheme: Scheme, fmt: Format) -> tuple[Tensor, Tensor]:
    """Rounds from left to right; returns the rounded weight and its scales [O, G]."""
    assert stats.hessian is not None
    w, u = original.clone(), inverse_factor(stats.hessian)
    size = w.shape[1] // fmt.groups(w.shape[1])
    scales: list[Tensor] = []
    for start in range(0, w.shape[1], size):
        group = slice(start, start + size)
        part = LayerStats(stats.input_norm[group], stats.tokens)
        scale = rtn(w[:, group], part, Scheme(scheme.format, -1, scheme.dtype)).scale
        assert scale is not None
        scales.append(scale)
        _round_columns(w, mask, u, start, start + size, scale.float().expand(-1, size), fmt)
    return w, torch.cat(scales, dim=1)


def _by_activity(
    original: Tensor, mask: Tensor, stats: LayerStats, scheme: Scheme, fmt: Format
) -> tuple[Tensor, Tensor]:
    """Rounds from the most active column to the least; returns the rounded weight and its scales [O, G]."""
    assert stats.hessian is not None
    scale = rtn(original, LayerStats(stats.input_norm, stats.tokens), scheme).scale
    assert scale is not None
    order = stats.hessian.diagonal().argsort(descending=True)
    w, kept = original[:, order].contiguous(), mask[:, order]
    steps = scale.float().repeat_interleave(w.shape[1] // scale.shape[1], dim=1)[:, order]
    _round_columns(w, kept, inverse_factor(stats.hessian[order][:, order]), 0, w.shape[1], steps, fmt)
    return w[:, order.argsort()].contiguous(), scale


def _round_columns(w: Tensor, mask: Tensor, u: Tensor, start: int, end: int, steps: Tensor, fmt: Format) -> None:
    """Rounds the columns [start, end) of w in place, block by block, and corrects the columns behind them."""
    for first in range(start, end, _BLOCK):
        last = min(first + _BLOCK, end)
        columns = w[:, first:last].t().contiguous()
        kept, step = mask[:, first:last].t().contiguous(), steps[:, first - start : last - start].t().contiguous()
        errors = torch.zeros_like(columns)
        for j in range(last - first):
            rounded = fmt.rounded(columns[j] / step[j]) * step[j]
            errors[j] = (columns[j] - rounded) / u[first + j, first + j]
            columns[j] = rounded
            later = u[first + j, first + j + 1 : last]
            columns[j + 1 :] -= later[:, None] * errors[j] * kept[j + 1 :]
        w[:, first:last] = columns.t()
        w[:, last:] -= (errors.t() @ u[first:last, last:]) * mask[:, last:]


def _fit_scales(q: Tensor, w: Tensor, hessian: Tensor, scale: Tensor) -> None:
    """Sets each group's scale [O, G], and q [O, I] with it, in place, to what is best for (w - q) H (w - q)^T.

    A scale that its dtype cannot hold well enough to be better than the one before stays.
    """
    gradient, size = (w - q) @ hessian, w.shape[1] // scale.shape[1]
    for g in range(scale.shape[1]):
        group = slice(g * size, (g + 1) * size)
        old = scale[:, g].float()
        values = q[:, group] / old[:, None]
        slope = (values * gradient[:, group]).sum(1)
        curvature = ((values @ hessian[group, group]) * values).sum(1).clamp(min=torch.finfo(torch.float32).tiny)
        new = (old + slope / curvature).to(scale.dtype)
        step = new.float() - old
        step = torch.where((new * old > 0) & (step * (2 * slope - step * curvature) > 0), step, 0.0)
        scale[:, g] = (old + step).to(scale.dtype)
        change = values * step[:, None]
        q[:, group] += change
        gradient -= change @ hessian[group]


def _sweep(q: Tensor, w: Tensor, mask: Tensor, hessian: Tensor, steps: Tensor, fmt: Format) -> None:
    """Sets each kept value of q [O, I], in place, to the grid point that is best for (w - q) H (w - q)^T."""
    gradient = (w - q) @ hessian
    for first in range(0, w.shape[1], _BLOCK):
        block = slice(first, first + _BLOCK)
        local, h = gradient[:, block].t().contiguous(), hessian[block, block]
        old = q[:, block].t().contiguous()
        kept, step = mask[:, block].t().contiguous(), steps[:, block].t().contiguous()
        new = old.clone()
        for j in range(len(new)):
            best = new[j] + local[j] / h[j, j]
            best = fmt.rounded(best / step[j]) * step[j]
            change = torch.where(kept[j], best - new[j], 0.0)
            new[j] += change
            local -= h[j, :, None] * change
        q[:, block] = new.t()
        gradient -= (new - old).t() @ hessian[block]
