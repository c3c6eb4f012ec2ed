"""Round to nearest, with the clipping of each group searched for the least squared error.

Symmetric: 0 is a grid point, so pruned weights stay pruned. Among scales around `max |w| / limit`, the one with the
least error is taken, each input weighted by its mean square where calibration gives it. A grid with one value more
below zero than above, as int4's from -8 to 7, is turned round by a negative scale where the largest weight of a group
is positive, so that it falls on the longer side: all 16 values count, at no cost in bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compressor.formats import Format, QuantizedWeight, make_format
from compressor.scheme import Scheme

CLIP_RATIOS = tuple(1.1 - step / 40 for step in range(21))
"""Shares of max |w| that are tried as the end of the grid."""

_BLOCK = 1 << 18


def rtn(weight: Tensor, stats: Any, scheme: Scheme, *, ratios: Sequence[float] = CLIP_RATIOS) -> QuantizedWeight:
    """Rounds a weight to its format's grid.

    Args:
        weight: [O, I], zeros where it is pruned.
        stats: `LayerStats` whose `input_norm` [I] weights the error, or None for the plain squared error.
        scheme: the format to round for.
        ratios: shares of max |w| that are tried as the end of the grid.

    Raises:
        ValueError: NaN or infinity in the weight, or a shape that the format refuses.
    """
    fmt = make_format(scheme)
    fmt.check(*weight.shape)
    weight = weight.detach().float()
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("the weight holds NaN or infinity; nothing can be quantised from it")
    if not fmt.scaled:
        return QuantizedWeight(weight)
    groups = weight.unflatten(1, (fmt.groups(weight.shape[1]), -1))
    importance = None
    if stats is not None:
        importance = stats.input_norm.to(weight.device).float().square().view(1, *groups.shape[1:])
        importance = importance / importance.mean().clamp_min(torch.finfo(torch.float32).tiny) + 1e-4
    # Rows are independent: blocks of them stay in the caches while their scales are searched.
    blocks = groups.split(max(1, _BLOCK // weight.shape[1]))
    scale = torch.cat([_search(block, importance, fmt, ratios) for block in blocks])
    return snap(weight, scale.squeeze(2).to(fmt.dtype), fmt)


def snap(weight: Tensor, scale: Tensor, fmt: Format) -> QuantizedWeight:
    """Rounds a weight [O, I] with given scales [O, G]; one that is negative for nothing becomes positive."""
    groups = weight.unflatten(1, (scale.shape[1], -1))
    values = fmt.rounded(groups / scale.float()[:, :, None])
    if fmt.grid is None:
        return QuantizedWeight(values.flatten(1), scale)
    values = values.to(torch.int8)
    if fmt.lopsided:  # equal weights give equal bytes
        turned = torch.where((scale < 0) & (values.amin(2) > fmt.grid[0]), -1, 1)
        values, scale = values * turned[:, :, None].to(torch.int8), scale * turned
    return QuantizedWeight(values.flatten(1), scale)


@dataclass(frozen=True)
class IntegerGrid:
    """An integer grid with fixed scales: called with rows of a weight, it gives what is served of them.

    Args:
        scale: [O, G] fp32.
        lowest, highest: grid values.
    """

    scale: Tensor
    lowest: int
    highest: int

    def __call__(self, weight: Tensor, rows: slice) -> Tensor:
        """Rows of a weight [O, I], rounded, in fp32."""
        scale = self.scale[rows][:, :, None]
        groups = weight.unflatten(1, (scale.shape[1], -1)) / scale
        return groups.round_().clamp_(self.lowest, self.highest).mul_(scale).flatten(1)


def _search(groups: Tensor, importance: Tensor | None, fmt: Format, ratios: Sequence[float]) -> Tensor:
    """The scale [O, G, 1] of least weighted error, as rounded to its dtype, for groups [O, G, group]."""
    largest, turned = groups.abs().amax(2, keepdim=True), torch.ones(())
    if fmt.lopsided:
        turned = torch.where(groups.amax(2, keepdim=True) == largest, -1.0, 1.0)
    tiny = torch.finfo(fmt.dtype).tiny
    best_scale = best_error = None
    for ratio in ratios:
        scale = ((largest * (ratio / fmt.largest)).clamp_min(tiny) * turned).to(fmt.dtype).float()
        squares = fmt.rounded(groups / scale).mul_(scale).sub_(groups).square_()
        error = (squares if importance is None else squares.mul_(importance)).sum(2, keepdim=True)
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
