"""Finds grid and scales again in a weight that was rounded to bf16: the inverse of `Format.unpack`.

A weight that was exported as plain numbers is still `round(q * scale)`. The largest of a group is one of at most 127
values of the grid, integers or e4m3 numbers; each gives a scale, to within its own rounding, and a scale is taken when
every number of the group comes out of it exactly. Nothing is approximated: a group that fits no scale makes the whole
weight fit none.

Shapes: O out_features, I in_features, G groups a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.formats import Format, QuantizedWeight
from compressor.formats.fp8 import E4M3


def fit_grid(weight: Tensor, fmt: Format) -> QuantizedWeight | None:
    """A grid and scales whose `unpack` is exactly `weight` [O, I], or None."""
    assert fmt.scaled
    groups = weight.unflatten(1, (fmt.groups(weight.shape[1]), -1)).flatten(0, 1).to(fmt.dtype)
    scale = torch.ones(len(groups), dtype=torch.float32)
    values = torch.zeros(groups.shape, dtype=torch.float32 if fmt.grid is None else torch.int8)
    open_rows = (groups != 0).any(1).nonzero().squeeze(1)
    for largest in _levels(fmt):
        if len(open_rows) == 0:
            break
        for step in (0, -1, 1):
            rows = groups[open_rows]
            ends = rows.float().abs().amax(1)
            tried = _nudged((ends / largest).to(fmt.dtype), step)
            if fmt.grid is not None and largest > fmt.grid[1]:  # only the side below zero reaches so far
                tried = torch.where(rows.float().amax(1) == ends, -tried, tried)
            fitted = fmt.rounded(rows.float() / tried.float()[:, None])
            fits = ((fitted * tried.float()[:, None]).to(fmt.dtype) == rows).all(1)
            scale[open_rows[fits]], values[open_rows[fits]] = tried[fits].float(), fitted[fits].to(values.dtype)
            open_rows = open_rows[~fits]
    if len(open_rows):
        return None
    shape = (weight.shape[0], -1)
    return QuantizedWeight(values.reshape(weight.shape), scale.reshape(shape).to(fmt.dtype))


def _levels(fmt: Format) -> list[float]:
    """What the largest weight of a group may be on the grid, largest first; without an integer grid, e4m3 numbers."""
    if fmt.grid is not None:
        return list(range(max(abs(limit) for limit in fmt.grid), 0, -1))
    codes = torch.arange(0x7E, 0, -1, dtype=torch.uint8)  # 448 down to 2^-9; 0x7f is NaN
    return [float(value) for value in codes.view(E4M3).float()]


def _nudged(scale: Tensor, step: int) -> Tensor:
    """The neighbour of a positive 16-bit float, `step` places away."""
    return (scale.view(torch.int16) + step).clamp_min(1).view(scale.dtype)
