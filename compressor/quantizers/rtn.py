"""Round to nearest, with the clipping of each group searched for the least squared error.

Symmetric: 0 is a grid point, so pruned weights stay pruned. Among scales from `max |w| / limit` down, the one with the
least error is taken, each input weighted by its mean square where calibration gives it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compressor.formats import QuantizedWeight, make_format
from compressor.scheme import Scheme

CLIP_RATIOS = tuple(1 - step / 40 for step in range(17))
"""Shares of max |w| that are tried as the end of the grid."""


def rtn(weight: Tensor, stats: Any, scheme: Scheme) -> QuantizedWeight:
    """Rounds a weight to its format's grid.

    Args:
        weight: [O, I], zeros where it is pruned.
        stats: `LayerStats` whose `input_norm` [I] weights the error, or None for the plain squared error.
        scheme: the format to round for.

    Raises:
        ValueError: NaN or infinity in the weight, or a shape that the format refuses.
    """
    fmt = make_format(scheme)
    fmt.check(*weight.shape)
    weight = weight.detach().float()
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("the weight holds NaN or infinity; nothing can be quantised from it")
    if fmt.grid is None:
        return QuantizedWeight(weight)
    groups = weight.unflatten(1, (fmt.groups(weight.shape[1]), -1))
    importance = torch.ones(1, *groups.shape[1:])
    if stats is not None:
        importance = stats.input_norm.float().square().view(1, *groups.shape[1:])
        importance = importance / importance.mean().clamp_min(torch.finfo(torch.float32).tiny) + 1e-4
    scale = _search(groups, importance, fmt.grid, fmt.dtype)
    values = _snap(groups, scale, fmt.grid)
    return QuantizedWeight(values.to(torch.int8).flatten(1), scale.squeeze(2).to(fmt.dtype))


def snap(weight: Tensor, scale: Tensor, grid: tuple[int, int]) -> QuantizedWeight:
    """Rounds a weight [O, I] with given scales [O, G]."""
    groups = weight.unflatten(1, (scale.shape[1], -1))
    return QuantizedWeight(_snap(groups, scale.float()[:, :, None], grid).to(torch.int8).flatten(1), scale)


def _snap(groups: Tensor, scale: Tensor, grid: tuple[int, int]) -> Tensor:
    return (groups / scale).round_().clamp_(*grid)


def _search(groups: Tensor, importance: Tensor, grid: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The scale [O, G, 1] of least weighted error, as rounded to `dtype`, for groups [O, G, group]."""
    largest = groups.abs().amax(2, keepdim=True)
    tiny = torch.finfo(dtype).tiny
    best_scale = best_error = None
    for ratio in CLIP_RATIOS:
        scale = (largest * (ratio / grid[1])).clamp_min(tiny).to(dtype).float()
        error = ((_snap(groups, scale, grid) * scale - groups).square_() * importance).sum(2, keepdim=True)
        if best_scale is None or best_error is None:
            best_scale, best_error = scale, error
            continue
        better = error < best_error
        best_scale, best_error = (
            torch.where(better, scale, best_scale),
            torch.where(better, error, best_error),
        )
    assert best_scale is not None
    return torch.where(largest == 0, torch.ones_like(best_scale), best_scale)
