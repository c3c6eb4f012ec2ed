"""One-shot solvers: they choose a mask and change the kept weights to make up for the pruned ones.

A solver maps a weight [O, I], statistics with a Hessian and the mask's shape to (weight, mask); pruned entries of the
weight are zero. A new one is one file here and one line in SOLVERS.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from compressor.calibration import LayerStats, weight_of
from compressor.masks import MaskShape
from compressor.solvers import sparsegpt

Solver = Callable[[Tensor, LayerStats, MaskShape], tuple[Tensor, Tensor]]

SOLVERS: dict[str, Solver] = {"sparsegpt": sparsegpt.solve}


def solve_block(
    linears: Mapping[str, nn.Module],
    stats: Mapping[str, LayerStats],
    shapes: Mapping[str, MaskShape],
    solver: str = "sparsegpt",
) -> dict[str, Tensor]:
    """Prune the linears of one block in place; returns the masks [O, I] of those that have a shape."""
    masks: dict[str, Tensor] = {}
    for layer, names in by_input(stats):
        for shape, members in _alike(names, shapes):
            weights = [weight_of(linears[name]).detach() for name in members]
            heights = [weight.shape[0] for weight in weights]
            solved, mask = SOLVERS[solver](torch.cat(weights), layer, shape)
            parts = zip(members, weights, solved.split(heights), mask.split(heights), strict=True)
            for name, weight, rows, kept_rows in parts:
                weight.copy_(rows)
                masks[name] = kept_rows.clone()
    return masks


def _alike(names: Sequence[str], shapes: Mapping[str, MaskShape]) -> list[tuple[MaskShape, list[str]]]:
    """Rows of one input and one shape are solved together, but where the shape is one of the whole layer."""
    groups: dict[tuple[MaskShape, str], list[str]] = {}
    for name in names:
        if shape := shapes.get(name):
            groups.setdefault((shape, "" if shape.by_row else name), []).append(name)
    return [(shape, members) for (shape, _), members in groups.items()]


def by_input(stats: Mapping[str, LayerStats]) -> list[tuple[LayerStats, list[str]]]:
    """Linears that read the same input are solved together: rows are independent, the factorisation is shared."""
    groups: dict[int, tuple[LayerStats, list[str]]] = {}
    for name, layer in stats.items():
        groups.setdefault(id(layer), (layer, []))[1].append(name)
    return list(groups.values())


def without_hessians(stats: Mapping[str, LayerStats]) -> dict[str, LayerStats]:
    """The statistics that outlive a block."""
    return {name: replace(layer, hessian=None) for name, layer in stats.items()}
